"""Scores of pictures, after Mix-of-Show §4.1: closed forms on features.

Features are unit vectors, (pictures, dim); references are features of pictures that were held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

TEXT_SCALE: Final = 2.5
"""CLIPScore's factor (Hessel et al., 2021)."""
RESAMPLES: Final = 2000
LEVEL: Final = 0.95
"""Of intervals."""


def reference_scores(made: Tensor, references: Tensor) -> Tensor:
    """Each picture's mean cosine with all references, (pictures,).

    The paper's published script compares with the first reference only: hand over `references[:1]` for that.
    """
    return (made @ references.T).mean(-1)


def text_scores(made: Tensor, texts: Tensor) -> Tensor:
    """Each picture's CLIPScore 2.5 · max(cos, 0), (pictures,); row k of `texts` is what picture k was to show."""
    return TEXT_SCALE * (made * texts).sum(-1).clamp(min=0)


def image_alignment(made: Tensor, references: Tensor) -> float:
    """Mean cosine of every made picture with every reference."""
    return float(reference_scores(made, references).mean())


def self_alignment(references: Tensor) -> float:
    """Mean cosine of every reference with every other: as near as pictures of one concept are to each other."""
    count = len(references)
    return float(((references @ references.T).sum() - count) / (count * (count - 1))) if count > 1 else 1.0


def nearest_concept(made: Tensor, references: Sequence[Tensor]) -> Tensor:
    """For each picture the number of the concept that owns the nearest reference of all, (pictures,)."""
    return torch.stack([(made @ own.T).amax(-1) for own in references], dim=-1).argmax(-1)


def interference(asked: Tensor, judged: Tensor, concepts: int) -> Tensor:
    """Row i: shares in which pictures asked for concept i were judged as each j, (concepts, concepts).

    A concept that was never asked for has a row of zeros.
    """
    counts = torch.zeros(concepts, concepts, dtype=torch.float64)
    counts.index_put_((asked, judged), torch.ones(len(asked), dtype=torch.float64), accumulate=True)
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def diversity(made: Tensor) -> float | None:
    """Mean distance 1 - cos of pictures of one prompt, (prompts, seeds, dim); none where there is one seed only."""
    count = made.shape[1]
    if count < 2:
        return None
    among = (made @ made.mT).sum((-1, -2)) - count
    return 1 - float((among / (count * (count - 1))).mean())


def distance_to_nearest(made: Tensor, training: Tensor) -> float:
    """Mean distance 1 - cos to the nearest training picture: near 0 where training pictures come back."""
    return float(1 - (made @ training.T).amax(-1).mean())


def drift(before: Tensor, after: Tensor) -> float:
    """Mean distance 1 - cos of pictures that were made from equal prompts and seeds by two models."""
    return float(1 - (before * after).sum(-1).mean())


def interval(values: Tensor) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values`, (seeds,), by bootstrap over seeds (Efron, 1979).

    Equal values always give equal intervals. With one seed it is that value twice: nothing is known then. With few
    seeds it is too narrow.
    """
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = values.double()[chosen].mean(-1)
    low, high = means.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return low, high
