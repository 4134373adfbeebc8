"""pictures.json: where a suite's pictures are, so that others can look at them, too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mixofshow.errors import BadInputError, field_problem, shown
from mixofshow.evaluation.suite.plan import Arm, Plan
from mixofshow.outputs import write_text
from mixofshow.reading import read_json

NAME: Final = "pictures.json"
State = Literal["single", "fused"]


class Asked(BaseModel):
    """What was asked for, in ordinary words, and the pictures that came of it, by path from the index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    pictures: tuple[Path, ...]


class Index(BaseModel):
    """Pictures by method, state ("single" or "fused") and concept; folders of references by concept.

    A concept's requests are the same for all methods and states, in the same order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    references: Mapping[str, Path]
    methods: Mapping[str, Mapping[State, Mapping[str, tuple[Asked, ...]]]]

    @model_validator(mode="after")
    def _same_for_all(self) -> Index:
        asked: dict[str, list[tuple[str, int]]] = {}
        for method, states in self.methods.items():
            for state in get_args(State):
                if states.get(state, {}).keys() != self.references.keys():
                    raise ValueError(
                        f"{shown(method)}: expected its {state} pictures of {shown(list(self.references))}"
                    )
                for name, row in states[state].items():
                    counts = [(one.prompt, len(one.pictures)) for one in row]
                    if counts != asked.setdefault(name, counts):
                        raise ValueError(f"{shown(method)}: other prompts, or numbers of pictures, of {shown(name)}")
        return self


def write_index(plan: Plan, pictures: Path, references: Mapping[str, Path], folder: Path) -> None:
    """Write pictures.json into the suite's folder."""

    def located(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    def listed(arm: Arm) -> dict[str, list[dict[str, object]]]:
        return {
            name: [
                {"prompt": asked.plain, "pictures": [located(path) for path in asked.request.paths(pictures)]}
                for asked in row
            ]
            for name, row in arm.items()
        }

    table = {
        "references": {name: located(path) for name, path in references.items()},
        "methods": {key: {"single": listed(plan.single[key]), "fused": listed(plan.fused[key])} for key in plan.fused},
    }
    write_text(folder / NAME, json.dumps(table, indent=1) + "\n")


def read_index(folder: Path) -> Index:
    """The index of a suite's folder. Raises BadInputError."""
    path = folder / NAME
    if not path.is_file():
        raise BadInputError(f"{folder}: expected the folder of a suite with {NAME}; `mixofshow evaluate` writes it")
    try:
        return Index.model_validate(read_json(path))
    except ValidationError as error:
        raise BadInputError(f"{path}: {field_problem(error.errors()[0], Index.model_fields)}") from error


def inside(folder: Path, path: Path, *, outside: bool) -> Path:
    """Where a path of the index leads to. Raises BadInputError if that is not in the folder, unless that is allowed.

    An index may be a stranger's: what it names elsewhere on this machine is nobody's to show.
    """
    found = folder / path
    try:
        found.stat()
        lies_within = found.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # loops of links, half characters
        reason = getattr(error, "strerror", None) or shown(error)
        raise BadInputError(f"{folder / NAME}: '{shown(path)}' leads nowhere ({reason})") from error
    if not (lies_within or outside):
        raise BadInputError(
            f"{folder / NAME}: '{shown(path)}' lies outside of the folder; --outside shows it all the same"
        )
    return found
