"""What is to be fused, on which base, and how: from files, from a table that lists them, or from a fused model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mixofshow.bases.loading import load_base, load_named_base
from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.errors import SettingsError, shown
from mixofshow.files import read_table
from mixofshow.fusion.editing import edited, edited_settings, fused_from, read_manifest
from mixofshow.fusion.settings import FusionSettings, make_fusion_settings, on_top
from mixofshow.fusion.solving import check_method

BASE: Final = "emojiland"
"""The base of those who name none."""
TABLES: Final = (".yaml", ".yml")


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
    device: str = "cpu",
) -> Job:
    """The job of concept files, of one YAML file that lists them, or of a fused `model`, edited.

    Given settings and base come before those in the YAML or the model. Raises BadInputError.
    """
    if model is not None and files:
        raise SettingsError(f"{files[0]}: to be added to {model} it must be given with --add")
    if model is not None:
        return _job_of_model(model, given, add=add, remove=remove, base=base, device=device)
    if remove or add:
        raise SettingsError("add and remove change a model that was fused; name its folder with --model")
    if len(files) == 1 and files[0].suffix in TABLES:
        return _job_of_table(read_table(files[0]), files[0], given, base, device)
    return _job(files, on_top(FusionSettings(), given), base, device)


def _job_of_table(
    table: Mapping[str, Any], source: Path, given: Mapping[str, Any], base: str | None, device: str
) -> Job:
    """A table with `concepts`, a list of files, perhaps `base`, and settings; paths are relative to its own file."""
    settings = {key: value for key, value in table.items() if key not in ("concepts", "base")}
    files, named = table.get("concepts"), table.get("base", BASE)
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise SettingsError(f"{source}: 'concepts': expected a list of concept files, found {shown(files)}")
    if not isinstance(named, str):
        raise SettingsError(f"{source}: 'base': expected a name or folder, found {shown(named)}")
    beside = source.parent / named
    base = base or (str(beside) if beside.is_dir() else named)
    checked = on_top(make_fusion_settings(settings, str(source)), given)
    return _job([source.parent / file for file in files], checked, base, device)


def _job_of_model(
    folder: Path,
    given: Mapping[str, Any],
    *,
    add: Iterable[Path],
    remove: Iterable[str],
    base: str | None,
    device: str,
) -> Job:
    """A fused folder's own job with concepts added (files), removed (names), or weighed anew."""
    pipeline = load_named_base(read_manifest(folder).base, base, str(folder), device=device)
    concepts, settings = fused_from(folder, pipeline)
    concepts = edited(concepts, [load_concept(path, pipeline) for path in add], remove)
    settings = edited_settings(settings, given, concepts)
    check_method(settings)
    return Job(pipeline, concepts, settings)


def _job(files: Iterable[Path], settings: FusionSettings, base: str | None, device: str) -> Job:
    """Settings are checked before anything large is read."""
    check_method(settings)
    pipeline = load_base(base or BASE, device=device)
    return Job(pipeline, [load_concept(path, pipeline) for path in files], settings)
