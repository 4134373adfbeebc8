"""What people answered: how often one method was preferred, how sure that is, and how far the people agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mixofshow.errors import BadInputError, field_problem
from mixofshow.reading import read_json

Question = Literal["image", "text"]
QUESTIONS: Final[tuple[Question, ...]] = ("image", "text")
LEVEL: Final = 0.95
Name = Annotated[str, Field(min_length=1, max_length=64)]


class Answer(BaseModel):
    """About one pair of pictures: which methods stood where, and which was chosen for each question."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    item: int = Field(ge=0)
    left: Name
    right: Name
    image: Name
    text: Name

    @model_validator(mode="after")
    def _chosen_of_two(self) -> Answer:
        for question in QUESTIONS:
            if getattr(self, question) not in (self.left, self.right):
                raise ValueError(f"{question}: expected {self.left} or {self.right}")
        return self

    @property
    def pair(self) -> tuple[str, str]:
        """Both methods, whichever side they stood on."""
        one, other = sorted((self.left, self.right))
        return one, other


class Answers(BaseModel):
    """One person's, as the page saves them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = Field(alias="schema")
    study: Name
    rater: Name
    items: int = Field(ge=1, le=100_000)
    answers: list[Answer]

    @model_validator(mode="after")
    def _complete(self) -> Answers:
        if [answer.item for answer in self.answers] != list(range(self.items)):
            raise ValueError(f"expected answers about pairs 0 to {self.items - 1}, found {len(self.answers)} answers")
        return self


@dataclass(frozen=True)
class Preference:
    """How often method A was preferred to B, of `answers` answers; the 95 % interval counts each answer as independent.

    `agreement` is Fleiss' kappa (1971) over the people: 1 they agree on every pair, 0 as by chance; None of one person.
    """

    pair: tuple[str, str]
    question: Question
    share: float
    interval: tuple[float, float]
    answers: int
    agreement: float | None


def score_study(paths: Sequence[Path]) -> list[Preference]:
    """Preferences by pair of methods and question. Raises BadInputError that names an incomplete or malformed file."""
    people = _people(paths)
    pairs = sorted({answer.pair for answer in people[0].answers})
    return [_preference(people, pair, question) for pair in pairs for question in QUESTIONS]


def _people(paths: Sequence[Path]) -> list[Answers]:
    if not paths:
        raise BadInputError("nothing to score: no file of answers was given")
    people: dict[str, tuple[Path, Answers]] = {}
    for path in paths:
        one = _read(path)
        first, of_first = next(iter(people.values()), (path, one))
        if _asked(one) != _asked(of_first):
            raise BadInputError(f"{path}: answers another study than {first} ({one.study}, not {of_first.study})")
        if one.rater in people:
            raise BadInputError(f"{path}: by the same person as {people[one.rater][0]}")
        people[one.rater] = path, one
    return [one for _, one in people.values()]


def _read(path: Path) -> Answers:
    try:
        return Answers.model_validate(read_json(path))
    except ValidationError as error:
        raise BadInputError(f"{path}: {field_problem(error.errors()[0], Answers.model_fields)}") from error


def _asked(one: Answers) -> tuple[str, list[tuple[str, str]]]:
    return one.study, [(answer.left, answer.right) for answer in one.answers]


def _preference(people: Sequence[Answers], pair: tuple[str, str], question: Question) -> Preference:
    chosen: dict[int, Counter[str]] = {}
    for one in people:
        for answer in one.answers:
            if answer.pair == pair:
                chosen.setdefault(answer.item, Counter())[getattr(answer, question)] += 1
    wins, answers = sum(votes[pair[0]] for votes in chosen.values()), sum(map(Counter.total, chosen.values()))
    return Preference(pair, question, wins / answers, wilson(wins, answers), answers, fleiss_kappa(chosen.values()))


def wilson(wins: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, 1927)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, spread = wins / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def fleiss_kappa(votes: Iterable[Mapping[str, int]]) -> float | None:
    """Agreement beyond chance (Fleiss, 1971); votes by choice for each subject, the same number of raters for all."""
    rows = list(votes)
    raters = sum(rows[0].values())
    if raters < 2:
        return None
    agreed = sum(sum(n * (n - 1) for n in row.values()) / (raters * (raters - 1)) for row in rows) / len(rows)
    totals = Counter[str]()
    for row in rows:
        totals.update(row)
    by_chance = sum((n / (raters * len(rows))) ** 2 for n in totals.values())
    return 1.0 if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)
