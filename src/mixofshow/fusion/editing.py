"""Adding a concept to a fused model, taking one out, weighing one anew: as if fused so from the start.

Nothing is added to or subtracted from the old weights. The folder keeps its concepts and settings, and all concepts
are fused again; what was recorded and kept is not recorded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixofshow.concepts.concept import Concept
from mixofshow.concepts.manifest import CONCEPTS, MANIFEST, read_concepts, read_manifest
from mixofshow.errors import BadInputError, ConceptFileError, nearest, shown
from mixofshow.fusion.settings import FusionSettings, make_fusion_settings, on_top, parse_weights


def fused_from(folder: Path, pipeline: Any) -> tuple[list[Concept], FusionSettings]:
    """The concepts and settings that a fused folder was made from; the pipeline is its base, not what is in the folder.

    Raises ConceptFileError, SettingsError.
    """
    manifest = read_manifest(folder)
    if not manifest.settings or not manifest.concepts:
        raise ConceptFileError(f"{folder / MANIFEST}: not written by a fusion of this version; fuse its concepts anew")
    settings = make_fusion_settings(manifest.settings, str(folder / MANIFEST))
    concepts = read_concepts(folder, manifest.hashes, pipeline)
    if not concepts:
        raise ConceptFileError(f"{folder / CONCEPTS}: the concepts of {MANIFEST} are not there; fuse them anew")
    return list(concepts), settings


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
