"""The controls that a composition names: known by the hashes of their files, and opened from these.

A PNG carries the names and hashes, not the files, which belong to somebody and may be large.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixofshow.errors import BadInputError, SettingsError, shown
from mixofshow.reading import named_in, read_bytes
from mixofshow.sampling.attention import visible
from mixofshow.sampling.controls import (
    PictureControl,
    check_extent,
    load_control,
    make_control,
    map_of_regions,
    network_hash,
)
from mixofshow.sampling.pictures import MAX_BYTES, embedded, is_embedded, read_picture
from mixofshow.sampling.regions import coverage, shape_of
from mixofshow.sampling.settings import Composition, ControlEntry


def with_known_controls(composition: Composition, source: str, folder: Path | None) -> Composition:
    """The composition whose controls are checked, named from the working folder, and known by hash.

    Their names are relative to the folder; without one no file is read, and they must be known already. `source` is for
    messages. Raises SettingsError, and BadInputError for a file that cannot be read.
    """
    controls = []
    for number, entry in enumerate(composition.controls):
        name = f"{source}: controls.{number}"
        auto = composition.auto or any(one.auto for one in composition.regions)
        _check(entry, len(composition.regions), name, auto=auto)
        controls.append(_known(entry, folder) if folder is not None else _checked_known(entry, name))
    return composition.model_copy(update={"controls": tuple(controls)})


def _check(entry: ControlEntry, regions: int, name: str, *, auto: bool) -> None:
    if entry.regions and auto:
        raise SettingsError(f"{name}.regions: expected none where places are found; save them by `save_regions` first")
    try:
        check_extent(entry.strength, entry.start, entry.end)
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}") from error
    if entry.regions and entry.strength_map is not None:
        raise SettingsError(f"{name}: expected a strength_map or regions, found both")
    if len(entry.regions) not in (0, regions):
        raise SettingsError(f"{name}.regions: expected {regions} strengths, one a region, found {len(entry.regions)}")


def _known(entry: ControlEntry, folder: Path) -> ControlEntry:
    """The entry with its files as they are named from the working folder, and their hashes."""
    beside = named_in(folder, entry.network)
    network = os.path.relpath(beside) if beside.is_dir() else entry.network
    weighed = entry.strength_map
    if weighed is not None and not is_embedded(weighed):
        weighed = embedded(read_picture(named_in(folder, weighed), "L"))
    named = {"network": network, "picture": os.path.relpath(named_in(folder, entry.picture)), "strength_map": weighed}
    found = entry.model_copy(update=named)
    hashes = {"network_hash": _network_hash(found), "picture_hash": _picture(found)[1]}
    return found.model_copy(update=hashes)


def _checked_known(entry: ControlEntry, name: str) -> ControlEntry:
    for field in ("network_hash", "picture_hash"):
        if getattr(entry, field) is None:
            raise SettingsError(f"{name}.{field}: expected the hash that the file is known by, found none")
    if entry.strength_map is not None and not is_embedded(entry.strength_map):
        raise SettingsError(f"{name}.strength_map: expected the picture itself, found '{shown(entry.strength_map)}'")
    return entry


def _network_hash(entry: ControlEntry) -> str:
    found = network_hash(entry.network)
    _require_same(f"control '{shown(entry.network)}'", "network", entry.network_hash, found)
    return found


def _picture(entry: ControlEntry) -> tuple[bytes, str]:
    """The control's picture as bytes, and their hash, which must be the known one."""
    data = read_bytes(Path(entry.picture), MAX_BYTES, BadInputError)
    found = hashlib.sha256(data).hexdigest()
    _require_same(shown(entry.picture), "picture", entry.picture_hash, found)
    return data, found


def _require_same(name: str, what: str, known: str | None, found: str) -> None:
    if known not in (None, found):
        raise SettingsError(
            f"{name}: another {what} than before, expected hash {shown(known, 12)}, found {found[:11]}…"
        )


def open_controls(composition: Composition, pipeline: Any, size: tuple[int, int]) -> list[PictureControl]:
    """A composition's controls for pictures of (width, height). Raises SettingsError, BadInputError."""
    made = []
    for entry in composition.controls:
        _network_hash(entry)
        network = load_control(entry.network, unet=pipeline.unet)
        picture = read_picture(_picture(entry)[0], "RGB", Path(entry.picture))
        extent = {"strength": entry.strength, "start": entry.start, "end": entry.end}
        strengths = _strengths(entry, composition, pipeline.vae_scale_factor, size)
        made.append(make_control(network, picture, **extent, strength_map=strengths))
    return made


def _strengths(
    entry: ControlEntry, composition: Composition, factor: int, size: tuple[int, int]
) -> str | Tensor | None:
    """The control's map of strengths: its own picture, or what it is to be in each region, by the latents' cells."""
    if not entry.regions:
        return entry.strength_map
    width, height = size
    shapes = [shape_of(region, width=width, height=height) for region in composition.regions]
    covers = [coverage(shape, columns=width // factor, rows=height // factor) for shape in shapes]
    seen = visible(torch.stack(covers), [region.front for region in composition.regions])
    return map_of_regions(list(zip(seen, entry.regions, strict=True)), outside=entry.outside)
