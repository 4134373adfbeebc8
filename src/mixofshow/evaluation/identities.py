"""Who stands in a picture of several concepts, wherever each stands: mixed up, missing, or there twice.

A picture's places (the boxes of its regions, or equal shares of it) are matched with the concepts that were asked for, one
to one and as well as possible. A place whose nearest concept of all is another one than it was matched with is confused;
a concept that is nearest in no place is missing, and one that is in more places than it was asked for is doubled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixofshow.evaluation import metrics


@dataclass(frozen=True)
class Identities:
    """One picture, in numbers of concepts: who was asked for; and of each place, whom it was matched with, who is nearest."""

    asked: tuple[int, ...]
    matched: tuple[int | None, ...]
    judged: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Of the places that were matched: with whom, and who is nearest."""
        return [(one, seen) for one, seen in zip(self.matched, self.judged, strict=True) if one is not None]

    @property
    def accuracy(self) -> float:
        """The share of the matched places that show whom they were matched with."""
        return sum(one == seen for one, seen in self.pairs) / len(self.pairs)

    @property
    def missing(self) -> Counter[int]:
        """How often more each concept was asked for than there are places that show it."""
        return Counter(self.asked) - Counter(self.judged)

    @property
    def doubled(self) -> Counter[int]:
        """In how many places more than asked for each of the concepts is that were asked for."""
        more = Counter(self.judged) - Counter(self.asked)
        return Counter({one: count for one, count in more.items() if one in self.asked})


def optimal_matching(scores: Tensor) -> list[int | None]:
    """The column for each row, none twice, so that the sum of scores is the largest: (rows, columns) -> (rows,).

    As many as there can be are matched; the other rows have None. Exact, by dynamic programming over sets of columns.
    """
    table = scores.double().tolist()
    best: dict[int, tuple[int, float, tuple[int | None, ...]]] = {0: (0, 0.0, ())}
    for row in table:
        found: dict[int, tuple[int, float, tuple[int | None, ...]]] = {}
        for taken, (count, total, chosen) in best.items():
            options = [(taken, (count, total, (*chosen, None)))] + [
                (taken | 1 << column, (count + 1, total + score, (*chosen, column)))
                for column, score in enumerate(row)
                if not taken >> column & 1
            ]
            for key, value in options:
                if key not in found or value[:2] > found[key][:2]:
                    found[key] = value
        best = found
    return list(max(best.values(), key=lambda value: value[:2])[2])


def identities(places: Tensor, references: Sequence[Tensor], asked: Sequence[int]) -> Identities:
    """Of one picture's places, (places, dim), given every concept's references (pictures, dim), and who was asked for."""
    scores = torch.stack([(places @ own.T).amax(-1) for own in references], dim=-1)
    matching = optimal_matching(scores[:, list(asked)])
    matched = tuple(None if one is None else asked[one] for one in matching)
    return Identities(tuple(asked), matched, tuple(metrics.nearest_concept(places, references).tolist()))


def summarized(pictures: Sequence[Sequence[Identities]], names: Sequence[str]) -> dict[str, Any]:
    """Figures of pictures, a row for each composition with one for each seed; the interval is over seeds."""
    every = [one for row in pictures for one in row]
    asked, judged = torch.tensor([pair for one in every for pair in one.pairs]).T
    matrix = metrics.interference(asked, judged, len(names))
    missing, doubled = (sum((getattr(one, what) for one in every), Counter[int]()) for what in ("missing", "doubled"))
    right = torch.tensor([[one.accuracy for one in row] for row in pictures], dtype=torch.float64)
    return {
        "accuracy": float((asked == judged).double().mean()),
        "interval": list(metrics.interval(right.mean(0))),
        "asked": sum(len(one.asked) for one in every),
        "missing": missing.total(),
        "doubled": doubled.total(),
        "names": list(names),
        "matrix": matrix.tolist(),
        "by_concept": {
            name: {"accuracy": float(matrix[k, k]), "missing": missing[k], "doubled": doubled[k]}
            for k, name in enumerate(names)
            if any(k in one.asked for one in every)
        },
    }
