"""Asking people: which of two methods' pictures shows the concept better, and which what was asked (Mix-of-Show Table 2c).

From a suite's pictures, which pictures.json lists, comes one HTML page for people to answer in a browser without any
server. Which method stands left is drawn by lot, half of the time each; the page does not show the methods' names. Their
answers give how often one method was preferred, how sure that is, and how far the people agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Annotated, Any, Final, Literal, get_args

from PIL import Image
from pydantic import Field, model_validator

from mixofshow.errors import BadInputError, DatasetError, SettingsError, nearest, shown
from mixofshow.evaluation.metrics import LEVEL
from mixofshow.evaluation.report import write_page
from mixofshow.evaluation.requests import Arm, RequestPlan
from mixofshow.evaluation.scorers import references_of
from mixofshow.images import label, read_image
from mixofshow.outputs import write_text
from mixofshow.reading import read_json
from mixofshow.sampling.pictures import embedded
from mixofshow.tables import Group, Settings

INDEX: Final = "pictures.json"
REFERENCES: Final = 4
"""Pictures of the concept that a page shows beside each pair, at most."""
SIDE: Final = 512
"""Pictures are shown no larger, in pixels."""

PictureState = Literal["single", "fused"]
Pair = tuple[str, str]
Show = Callable[[Path], str]
"""A picture by its path in the index, as a data URI."""
PREFERENCES: Final = ("preferred", "to", "question", "share", "95 %", "answers", "kappa")
Question = Literal["image", "text"]
MethodName = Annotated[str, Field(min_length=1, max_length=64)]


class PromptPictures(Group):
    """What was asked for, in ordinary words, and the pictures that came of it, by path from the index."""

    prompt: str
    pictures: tuple[Path, ...]


class PictureIndex(Settings):
    """Pictures by method, state ("single" or "fused") and concept; folders of references by concept.

    A concept's requests are the same for all methods and states, in the same order.
    """

    references: Mapping[str, Path]
    methods: Mapping[str, Mapping[PictureState, Mapping[str, tuple[PromptPictures, ...]]]]

    @model_validator(mode="after")
    def _same_for_all(self) -> PictureIndex:
        asked: dict[str, list[tuple[str, int]]] = {}
        for method, state in ((method, state) for method in self.methods for state in get_args(PictureState)):
            rows = self.methods[method].get(state, {})
            if rows.keys() != self.references.keys():
                raise ValueError(f"{shown(method)}: expected its {state} pictures of {shown(list(self.references))}")
            for name, row in rows.items():
                counts = [(one.prompt, len(one.pictures)) for one in row]
                if counts != asked.setdefault(name, counts):
                    raise ValueError(f"{shown(method)}: other prompts, or numbers of pictures, of {shown(name)}")
        return self


def write_index(plan: RequestPlan, pictures: Path, references: Mapping[str, Path], folder: Path) -> None:
    """Write pictures.json into the suite's folder."""

    def located(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    def listed(arm: Arm) -> dict[str, list[dict[str, object]]]:
        return {
            name: [{"prompt": one.plain, "pictures": [*map(located, one.request.paths(pictures))]} for one in row]
            for name, row in arm.items()
        }

    table = {
        "references": {name: located(path) for name, path in references.items()},
        "methods": {key: {"single": listed(plan.single[key]), "fused": listed(plan.fused[key])} for key in plan.fused},
    }
    write_text(folder / INDEX, json.dumps(table, indent=1) + "\n")


def read_index(folder: Path) -> PictureIndex:
    """The index of a suite's folder. Raises BadInputError."""
    if not (path := folder / INDEX).is_file():
        raise BadInputError(f"{folder}: expected the folder of a suite with {INDEX}; `mixofshow evaluate` writes it")
    return PictureIndex.of(read_json(path), str(path))


def _inside(folder: Path, path: Path, *, outside: bool) -> Path:
    """Where a path of the index leads to. Raises BadInputError if that is not in the folder, unless that is allowed.

    An index may be a stranger's: what it names elsewhere on this machine is nobody's to show.
    """
    found = folder / path
    try:
        found.stat()
        lies_within = found.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # loops of links, half characters
        reason = getattr(error, "strerror", None) or shown(error)
        raise BadInputError(f"{folder / INDEX}: '{shown(path)}' leads nowhere ({reason})") from error
    if not (lies_within or outside):
        raise BadInputError(
            f"{folder / INDEX}: '{shown(path)}' lies outside of the folder; `outside` shows it all the same"
        )
    return found


def build_study(
    folder: Path,
    pairs: Sequence[str],
    target: Path,
    *,
    count: int = 40,
    seed: int = 0,
    state: PictureState = "fused",
    outside: bool = False,
) -> int:
    """Write the page and return how many pairs of pictures it asks about.

    `folder` is what a suite wrote, `pairs` are methods as "A,B"; of each, `count` pictures are asked about, spread
    over the concepts and drawn by lot from `seed`. Pictures lie in the folder, unless others are allowed (`outside`).
    Raises BadInputError, SettingsError.
    """
    if count < 1:
        raise SettingsError(f"count: expected at least 1, found {count}")
    index = read_index(folder)
    place = partial(_inside, folder, outside=outside)
    asked, random = [_pair(text, index) for text in pairs], Random(seed)

    def show(path: Path) -> str:
        return _encoded(read_image(place(path), label(path), error=DatasetError).image)

    items = [item for pair in asked for item in _items(index, show, pair, state, count=count, random=random)]
    random.shuffle(items)
    references = {
        name: [_encoded(image) for image in references_of(place(index.references[name]))[:REFERENCES]]
        for name in sorted({item["concept"] for item in items})
    }
    study = {"pairs": asked, "items": items, "references": references}
    identity = hashlib.sha256(json.dumps(study).encode()).hexdigest()[:16]
    write_page(target, "study.html.j2", study={"id": identity, **study})
    return len(items)


def _pair(text: str, index: PictureIndex) -> Pair:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in index.methods:
            raise SettingsError(f"pairs: no method '{shown(name)}' in this suite{nearest(name, index.methods)}")
    if len(names) != 2 or names[0] == names[1]:
        raise SettingsError(f"pairs: expected two methods as A,B, found '{shown(text)}'")
    return names[0], names[1]


def _items(
    index: PictureIndex, show: Show, pair: Pair, state: PictureState, *, count: int, random: Random
) -> Iterator[dict[str, Any]]:
    """What is asked about a pair of methods: pictures of one prompt and seed, side by side; concepts take turns."""
    rows = [_shuffled(_of_concept(index, pair, state, name), random) for name in index.references]
    found = [one for one in chain.from_iterable(zip_longest(*rows)) if one is not None]
    if len(found) < count:
        raise BadInputError(f"the suite has {len(found)} pictures of each method, {count} are asked for")
    lefts = _shuffled((number % 2 for number in range(count)), random)
    for (name, prompt, pictures), left in zip(found[:count], lefts, strict=False):
        sides = [{"method": pair[k], "picture": show(pictures[k])} for k in (left, 1 - left)]
        yield {"concept": name, "prompt": prompt, "left": sides[0], "right": sides[1]}


def _of_concept(index: PictureIndex, pair: Pair, state: PictureState, name: str) -> Iterator[tuple[str, str, Any]]:
    """Concept, prompt, and both methods' pictures of each of its prompts and seeds."""
    one, other = (index.methods[method][state][name] for method in pair)
    for first, second in zip(one, other, strict=True):
        for pictures in zip(first.pictures, second.pictures, strict=True):
            yield name, first.prompt, pictures


def _shuffled(values: Iterable[Any], random: Random) -> list[Any]:
    every = list(values)
    return random.sample(every, len(every))


def _encoded(image: Image.Image) -> str:
    """The picture as a data URI, drawn anew: what a file says about its making would tell the method."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    return embedded(image)


class Answer(Group, strict=True):
    """About one pair of pictures: which methods stood where, and which was chosen for each question."""

    item: int = Field(ge=0)
    left: MethodName
    right: MethodName
    image: MethodName
    text: MethodName

    @model_validator(mode="after")
    def _chosen_of_two(self) -> Answer:
        for question in get_args(Question):
            if getattr(self, question) not in (self.left, self.right):
                raise ValueError(f"{question}: expected {self.left} or {self.right}")
        return self

    @property
    def pair(self) -> Pair:
        """Both methods, whichever side they stood on."""
        one, other = sorted((self.left, self.right))
        return one, other


class Answers(Settings, strict=True):
    """One person's, as the page saves them."""

    version: Literal[1] = Field(alias="schema")
    study: MethodName
    rater: MethodName
    items: int = Field(ge=1, le=100_000)
    answers: list[Answer]

    @model_validator(mode="after")
    def _complete(self) -> Answers:
        if [answer.item for answer in self.answers] != list(range(self.items)):
            raise ValueError(f"expected answers about pairs 0 to {self.items - 1}, found {len(self.answers)} answers")
        return self

    @property
    def asked(self) -> tuple[str, list[Pair]]:
        """The study, and which methods stood left and right in it."""
        return self.study, [(answer.left, answer.right) for answer in self.answers]


@dataclass(frozen=True)
class Preference:
    """How often method A was preferred to B, of `answers` answers; the 95 % interval counts each answer as independent.

    `agreement` is Fleiss' kappa (1971) over the people: 1 they agree on every pair, 0 as by chance; None of one person.
    """

    pair: Pair
    question: Question
    share: float
    interval: tuple[float, float]
    answers: int
    agreement: float | None

    @property
    def row(self) -> tuple[str, ...]:
        """As a table has it, under PREFERENCES."""
        low, high = self.interval
        kappa = "" if self.agreement is None else f"{self.agreement:.2f}"
        return (*self.pair, self.question, f"{self.share:.1%}", f"{low:.1%}–{high:.1%}", str(self.answers), kappa)


def score_study(paths: Sequence[Path]) -> list[Preference]:
    """Preferences by pair of methods and question. Raises BadInputError that names an incomplete or malformed file."""
    if not paths:
        raise BadInputError("nothing to score: no file of answers was given")
    people: dict[str, tuple[Path, Answers]] = {}
    for path in paths:
        one = Answers.of(read_json(path), str(path))
        first, of_first = next(iter(people.values()), (path, one))
        if one.asked != of_first.asked:
            raise BadInputError(f"{path}: answers another study than {first} ({one.study}, not {of_first.study})")
        if one.rater in people:
            raise BadInputError(f"{path}: by the same person as {people[one.rater][0]}")
        people[one.rater] = path, one
    answers = [answer for _, one in people.values() for answer in one.answers]
    pairs = sorted({answer.pair for answer in answers})
    return [_preference(answers, pair, question) for pair in pairs for question in get_args(Question)]


def _preference(answers: Sequence[Answer], pair: Pair, question: Question) -> Preference:
    votes: dict[int, Counter[str]] = {}
    for answer in answers:
        if answer.pair == pair:
            votes.setdefault(answer.item, Counter())[getattr(answer, question)] += 1
    wins, total = sum(one[pair[0]] for one in votes.values()), sum(map(Counter.total, votes.values()))
    return Preference(pair, question, wins / total, wilson(wins, total), total, fleiss_kappa(votes.values()))


def wilson(wins: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, 1927)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, spread = wins / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def fleiss_kappa(votes: Iterable[Mapping[Any, int]]) -> float | None:
    """Agreement beyond chance (Fleiss, 1971); votes by choice for each subject, the same number of raters for all."""
    rows = list(votes)
    raters = sum(rows[0].values())
    if raters < 2:
        return None
    agreed = sum(sum(n * (n - 1) for n in row.values()) / (raters * (raters - 1)) for row in rows) / len(rows)
    totals = Counter[Any]()
    for row in rows:
        totals.update(row)
    by_chance = sum((n / (raters * len(rows))) ** 2 for n in totals.values())
    return 1.0 if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)
