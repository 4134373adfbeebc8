"""Adding a concept to a fused model, taking one out, weighing one anew: as if fused so from the start.

Nothing is added to or subtracted from the old weights. The folder keeps its concepts and settings, and all concepts
are fused again; what was recorded and kept is not recorded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.model import CONCEPTS, MANIFEST
from mixofshow.errors import BadInputError, ConceptFileError, field_problem, nearest, shown
from mixofshow.fusion.settings import FusionSettings, make_fusion_settings, on_top, parse_weights
from mixofshow.reading import parse_json, read_bytes


class _Entry(BaseModel):
    """A concept in a manifest."""

    name: str
    hash: str


class Manifest(BaseModel):
    """The part of a fused folder's manifest that says how to fuse it again."""

    base: str = Field(max_length=128)
    concepts: tuple[_Entry, ...] = Field(min_length=1)
    settings: dict[str, Any]


def read_manifest(folder: Path) -> Manifest:
    """What a fused folder says it was made from. Raises ConceptFileError."""
    listing = folder / MANIFEST
    try:
        return Manifest.model_validate(parse_json(read_bytes(listing), str(listing), ConceptFileError))
    except ValidationError as error:
        problem = field_problem(error.errors()[0], Manifest.model_fields)
        raise ConceptFileError(f"{listing}: not written by a fusion of this version ({problem})") from error


def fused_from(folder: Path, pipeline: Any) -> tuple[list[Concept], FusionSettings]:
    """The concepts and settings that a fused folder was made from; the pipeline is its base, not what is in the folder.

    Raises ConceptFileError, SettingsError.
    """
    manifest = read_manifest(folder)
    settings = make_fusion_settings(manifest.settings, str(folder / MANIFEST))
    hashes = {one.name: one.hash for one in manifest.concepts}
    concepts = [load_concept(path, pipeline) for path in sorted((folder / CONCEPTS).glob("*.safetensors"))]
    if hashes != (found := {concept.info.name: concept.hash for concept in concepts}):
        raise ConceptFileError(
            f"{folder / CONCEPTS}: its files ({', '.join(found) or 'none'}) are not the concepts of {MANIFEST}"
        )
    return concepts, settings


def edited(concepts: Sequence[Concept], add: Iterable[Concept], remove: Iterable[str]) -> list[Concept]:
    """The concepts with some taken out, by name, and some added. Raises BadInputError for a name that is not there."""
    gone = list(remove)
    names = [concept.info.name for concept in concepts]
    for name in gone:
        if name not in names:
            raise BadInputError(f"no concept is called '{shown(name)}' in this model{nearest(name, names)}")
    return [*(concept for concept in concepts if concept.info.name not in gone), *add]


def edited_settings(settings: FusionSettings, given: Mapping[str, Any], concepts: Sequence[Concept]) -> FusionSettings:
    """The settings with given ones on top; weights by name stay for the concepts that are still there."""
    if isinstance(settings.weights, Mapping):
        names = {concept.info.name for concept in concepts}
        kept = {name: weight for name, weight in settings.weights.items() if name in names}
        asked = parse_weights(given.get("weights", kept or "equal"))
        given = {**given, "weights": {**kept, **asked} if isinstance(asked, Mapping) else asked}
    return on_top(settings, given)
