"""What is to be fused, on which base, and how: from files, from a table that lists them, or from a fused model.

A fused model keeps its concepts and settings. To add a concept, take one out or weigh one anew, all are fused again, as
if so from the start; nothing is added to or subtracted from the old weights, and what was recorded is not recorded again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mixofshow.bases.loading import EMBEDDED, load_base, load_named_base
from mixofshow.concepts.concept import Concept, fitted, follow_clip_skip, load_concept, vocabulary
from mixofshow.concepts.interchange.importing import AS_USUAL, name_ahead, open_concept, read_ahead
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.concepts.manifest import CONCEPTS, MANIFEST, read_concepts, read_manifest
from mixofshow.errors import BadInputError, ConceptFileError, SettingsError, field_problem, nearest, shown
from mixofshow.fusion.settings import FusionSettings, on_top, parse_weights
from mixofshow.fusion.solving import check_method, check_weights
from mixofshow.fusion.store import tell_of_threads
from mixofshow.reading import MAX_YAML_BYTES, named_in, parse_json, read_bytes, read_table

BASE: Final = "emojiland"
"""The base of those who name none."""
TABLES: Final = (".yaml", ".yml")
LIST: Final = ".json"
"""How the reference implementation lists concepts."""


@dataclass(frozen=True)
class Job:
    """Concepts, their base, and how to fuse them."""

    pipeline: Any
    concepts: Sequence[Concept]
    settings: FusionSettings


def make_job(
    files: Sequence[Path],
    given: Mapping[str, Any],
    *,
    model: Path | None = None,
    add: Sequence[Path] = (),
    remove: Sequence[str] = (),
    base: str | None = None,
    **loading: Any,
) -> Job:
    """The job of concept files, of one YAML or JSON file that lists them, or of a fused `model`, edited.

    Given settings and base come before those in the YAML or the model; `loading` are options of `load_base`. Raises
    BadInputError.
    """
    if model is not None:
        if files:
            raise SettingsError(f"{files[0]}: to be added to {model} it must be given with `add`")
        return _job_of_model(model, given, add=add, remove=remove, base=base, **loading)
    if remove or add:
        raise SettingsError("`add` and `remove` change a model that was fused; name its folder with `model`")
    listing = _listing(files)
    settings = on_top(listing.settings, given)
    check_method(settings)  # before anything large is read
    ahead = [(load_concept if how is None else read_ahead)(path) for path, how in listing.files]
    vocabulary(filter(None, ahead))  # as is what only the concepts' names tell
    check_weights(settings, map(_name, ahead, listing.files))
    pipeline = load_base(base or listing.base, **loading)
    concepts = [
        one if one and how is None else open_concept(path, pipeline, how or AS_USUAL, quiet=True)
        for one, (path, how) in zip(ahead, listing.files, strict=True)
    ]
    follow_clip_skip(pipeline, concepts)
    there = [fitted(one, pipeline, str(path)) for one, (path, _) in zip(concepts, listing.files, strict=True)]
    return Job(pipeline, there, settings)


def _name(ahead: Concept | None, listed: tuple[Path, ImportSettings | None]) -> str:
    """What a concept is called, or will be, if it is another tool's."""
    path, how = listed
    return ahead.info.name if ahead else name_ahead(path, how or AS_USUAL)


def inputs_of(files: Sequence[Path], *, model: Path | None = None, out: Path | None = None) -> list[Path]:
    """What `make_job` reads: the files, what one names that lists others, and the model, if that is not edited in place.

    Raises BadInputError for a list or model that cannot be read.
    """
    if model is not None:
        read_manifest(model)
        return [*files, *([model] if out != model else [])]
    listing = _listing(files)
    bases = [] if listing.base in EMBEDDED else [Path(listing.base)]
    return [*files, *(path for path, _ in listing.files), *bases]


class _Listed(BaseModel):
    """One concept of the reference implementation's list; ours and other tools' files may stand there too."""

    model_config = ConfigDict(extra="forbid")

    lora_path: str
    unet_alpha: float = Field(1.0, ge=0, le=100)
    text_encoder_alpha: float = Field(1.0, ge=0, le=100)
    concept_name: str | None = Field(None, max_length=256)


_LISTED: Final = TypeAdapter(Annotated[list[_Listed], Field(min_length=1)])


@dataclass(frozen=True)
class _Listing:
    """Concept files, for those of other tools with how they are read, and what stands beside them in a list."""

    files: Sequence[tuple[Path, ImportSettings | None]]
    settings: FusionSettings = field(default_factory=FusionSettings)
    base: str = BASE


def _listing(files: Sequence[Path]) -> _Listing:
    """The files themselves, or what a single table or list names, from its own folder."""
    if len(files) == 1 and files[0].suffix in TABLES:
        return _read_table(files[0])
    if len(files) == 1 and files[0].suffix == LIST:
        return _read_list(files[0])
    return _Listing([(file, None) for file in files])


def _read_list(source: Path) -> _Listing:
    """A JSON list of concepts and how strong each is."""
    try:
        listed = _LISTED.validate_python(parse_json(read_bytes(source, MAX_YAML_BYTES, SettingsError), str(source)))
    except ValidationError as error:
        raise SettingsError(f"{source}: {field_problem(error.errors()[0], _Listed.model_fields)}") from error
    files = []
    for one in listed:
        how = {"unet_alpha": one.unet_alpha, "text_encoder_alpha": one.text_encoder_alpha}
        files.append((named_in(source.parent, one.lora_path), ImportSettings(words=one.concept_name, **how)))
    return _Listing(files)


def _read_table(source: Path) -> _Listing:
    """A table with `concepts`, a list of files, perhaps `base`, and settings."""
    table = dict(read_table(source))
    files, base = table.pop("concepts", None), table.pop("base", BASE)
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise SettingsError(f"{source}: 'concepts': expected a list of concept files, found {shown(files)}")
    if not isinstance(base, str):
        raise SettingsError(f"{source}: 'base': expected a name or folder, found {shown(base)}")
    beside = named_in(source.parent, base)
    paths = [(named_in(source.parent, file), None) for file in files]
    return _Listing(
        paths, FusionSettings.of(table, str(source)), str(beside) if beside.is_dir() else os.path.expanduser(base)
    )


def _job_of_model(
    folder: Path,
    given: Mapping[str, Any],
    *,
    add: Iterable[Path],
    remove: Iterable[str],
    base: str | None,
    **loading: Any,
) -> Job:
    """A fused folder's own job with concepts added (files), removed (names), or weighed anew."""
    manifest = read_manifest(folder)
    concepts, settings = fused_from(folder)
    concepts = edited(concepts, map(load_concept, add), remove)
    settings = edited_settings(settings, given, concepts)
    check_method(settings)
    vocabulary(concepts)
    check_weights(settings, [one.info.name for one in concepts])
    pipeline = load_named_base(manifest.base, base, str(folder), **loading)
    tell_of_threads(folder, manifest.threads or torch.get_num_threads(), torch.get_num_threads())
    return Job(pipeline, [fitted(one, pipeline, f"concept <{one.info.name}>") for one in concepts], settings)


def fused_from(folder: Path, pipeline: Any = None) -> tuple[list[Concept], FusionSettings]:
    """The concepts and settings that a fused folder was made from; with its base, also checks that they fit it.

    Raises ConceptFileError, SettingsError.
    """
    manifest = read_manifest(folder)
    if not manifest.settings or not manifest.concepts:
        raise ConceptFileError(f"{folder / MANIFEST}: not written by a fusion of this version; fuse its concepts anew")
    settings = FusionSettings.of(FusionSettings.renamed(manifest.settings, quiet=True), str(folder / MANIFEST))
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
        kept = {name: weight for name, weight in settings.weights.items() if name.partition(".")[0] in names}
        asked = parse_weights(given.get("weights", kept or "equal"))
        given = {**given, "weights": {**kept, **asked} if isinstance(asked, Mapping) else asked}
    return on_top(settings, given)
