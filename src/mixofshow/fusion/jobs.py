"""What is to be fused, on which base, and how: from files, from a table that lists them, or from a fused model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mixofshow.bases.loading import load_base, load_named_base
from mixofshow.concepts.concept import Concept, fitted, follow_clip_skip, load_concept
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.concepts.manifest import read_manifest
from mixofshow.errors import SettingsError, field_problem, shown
from mixofshow.fusion.editing import edited, edited_settings, fused_from
from mixofshow.fusion.settings import FusionSettings, make_fusion_settings, on_top
from mixofshow.fusion.solving import check_method
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
    if model is not None and files:
        raise SettingsError(f"{files[0]}: to be added to {model} it must be given with --add")
    if model is not None:
        return _job_of_model(model, given, add=add, remove=remove, base=base, **loading)
    if remove or add:
        raise SettingsError("add and remove change a model that was fused; name its folder with --model")
    if len(files) == 1 and files[0].suffix in TABLES:
        return _job_of_table(read_table(files[0]), files[0], given, base, loading)
    settings = on_top(FusionSettings(), given)
    if len(files) == 1 and files[0].suffix == LIST:
        return _job_of_list(files[0], settings, base, loading)
    return _job(files, settings, base, loading)


def inputs_of(files: Sequence[Path], *, model: Path | None = None, out: Path | None = None) -> list[Path]:
    """What `make_job` reads: the files, what one names that lists others, and the model, if that is not edited in place.

    Raises BadInputError for a list or model that cannot be read.
    """
    if model is not None:
        read_manifest(model)
        return [*files, *([model] if out != model else [])]
    if len(files) != 1 or files[0].suffix not in (*TABLES, LIST):
        return list(files)
    named: list[Any] = []
    if files[0].suffix == LIST:
        named = [one.lora_path for one in _read_list(files[0])]
    else:
        table = read_table(files[0])
        listed = table.get("concepts")
        named = [*(listed if isinstance(listed, list) else ()), table.get("base")]
    return [*files, *(named_in(files[0].parent, one) for one in named if isinstance(one, str))]


class _Listed(BaseModel):
    """One concept of the reference implementation's list; ours and other tools' files may stand there too."""

    model_config = ConfigDict(extra="forbid")

    lora_path: str
    unet_alpha: float = Field(1.0, ge=0, le=100)
    text_encoder_alpha: float = Field(1.0, ge=0, le=100)
    concept_name: str | None = Field(None, max_length=256)


_LISTING: Final = TypeAdapter(Annotated[list[_Listed], Field(min_length=1)])


def _job_of_list(source: Path, settings: FusionSettings, base: str | None, loading: Mapping[str, Any]) -> Job:
    """A JSON list of concepts and how strong each is; paths are relative to the list's own file."""
    listed = _read_list(source)
    check_method(settings)
    pipeline = load_base(base or BASE, **loading)
    concepts = []
    for one in listed:
        how = ImportSettings(
            words=one.concept_name, unet_alpha=one.unet_alpha, text_encoder_alpha=one.text_encoder_alpha
        )
        path = named_in(source.parent, one.lora_path)
        concepts.append((path, open_concept(path, pipeline, how, quiet=True)))
    return _followed(pipeline, concepts, settings)


def _read_list(source: Path) -> list[_Listed]:
    try:
        return _LISTING.validate_python(parse_json(read_bytes(source, MAX_YAML_BYTES, SettingsError), str(source)))
    except ValidationError as error:
        raise SettingsError(f"{source}: {field_problem(error.errors()[0], _Listed.model_fields)}") from error


def _job_of_table(
    table: Mapping[str, Any], source: Path, given: Mapping[str, Any], base: str | None, loading: Mapping[str, Any]
) -> Job:
    """A table with `concepts`, a list of files, perhaps `base`, and settings; paths are relative to its own file."""
    settings = {key: value for key, value in table.items() if key not in ("concepts", "base")}
    files, named = table.get("concepts"), table.get("base", BASE)
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise SettingsError(f"{source}: 'concepts': expected a list of concept files, found {shown(files)}")
    if not isinstance(named, str):
        raise SettingsError(f"{source}: 'base': expected a name or folder, found {shown(named)}")
    beside = named_in(source.parent, named)
    base = base or (str(beside) if beside.is_dir() else named)
    checked = on_top(make_fusion_settings(settings, str(source)), given)
    return _job([named_in(source.parent, file) for file in files], checked, base, loading)


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
    pipeline = load_named_base(manifest.base, base, str(folder), **loading)
    tell_of_threads(folder, manifest.threads or torch.get_num_threads(), torch.get_num_threads())
    concepts, settings = fused_from(folder, pipeline)
    concepts = edited(concepts, [load_concept(path, pipeline) for path in add], remove)
    settings = edited_settings(settings, given, concepts)
    check_method(settings)
    return Job(pipeline, concepts, settings)


def _job(files: Iterable[Path], settings: FusionSettings, base: str | None, loading: Mapping[str, Any]) -> Job:
    """Settings are checked before anything large is read."""
    check_method(settings)
    pipeline = load_base(base or BASE, **loading)
    concepts = [(path, load_concept(path)) for path in files]
    return _followed(pipeline, concepts, settings)


def _followed(pipeline: Any, concepts: Sequence[tuple[Path, Concept]], settings: FusionSettings) -> Job:
    """The job in which the base's text is read as the concepts' files say."""
    follow_clip_skip(pipeline, [concept for _, concept in concepts])
    return Job(pipeline, [fitted(concept, pipeline, str(path)) for path, concept in concepts], settings)
