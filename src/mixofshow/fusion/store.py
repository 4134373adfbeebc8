"""Recordings in files: what was recorded of one concept, kept for later fusions or from other machines.

A file is found again by what made it: the concept's content, the base model, the prompts, seeds and steps. Only one
layer's numbers are in memory at a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError
from torch import Tensor

from mixofshow.errors import BadInputError, ConceptFileError, SettingsError, field_problem, shown
from mixofshow.files import TensorFile, raw, write_tensors
from mixofshow.fusion.statistics import TENSORS, LayerStatistics
from mixofshow.reading import parse_json

logger = logging.getLogger(__name__)

STORAGES: Final = ("fp64", "fp32", "fp16", "low-rank")
METADATA_KEY: Final = "mixofshow_recording"
DIGEST_KEY: Final = "sha256"
FORMAT_VERSION: Final = 1
KEPT: Final = 2**28
ROOM: Final = 2**32
"""Bytes that a fusion's own recordings may take in memory, where it was not told what it may."""
RANK_SHARE: Final = 8
"""Low-rank storage keeps the largest eighth of the eigenvalues, and of the rest the diagonal."""


class RecordingInfo(BaseModel):
    """What a recording's file says of itself; rows and digests by input name.

    `error` is what storing it changed: mean and largest ‖C' − C‖ / ‖C‖ over the inputs.
    """

    model_config = ConfigDict(frozen=True)

    format_version: StrictInt = Field(FORMAT_VERSION, le=FORMAT_VERSION)
    key: dict[str, Any]
    storage: str
    threads: int | None = None
    rows: dict[str, int]
    digests: dict[str, str]
    error: tuple[float, float]


class Recorded(Protocol):
    """What was recorded of one concept: `statistics(input name)` is what a layer saw, in double."""

    def statistics(self, name: str, device: Any = "cpu", width: int | None = None) -> LayerStatistics:
        """Of a layer with that `width` of inputs, if it is given."""


Found_co = TypeVar("Found_co", bound=Recorded, covariant=True)


class Keeper(Protocol[Found_co]):
    """Where recordings are kept, and perhaps found again, by what made them."""

    def find(self, key: Mapping[str, Any], name: str, inputs: set[str]) -> Found_co | None:
        """The recording made with `key`, if it is there and holds these inputs."""

    def save(self, key: Mapping[str, Any], name: str, seen: Mapping[str, LayerStatistics]) -> Found_co:
        """Keep what was seen."""


@dataclass(frozen=True)
class Recording:
    """A recording's file: `statistics(input name)` reads what a layer saw."""

    file: TensorFile
    info: RecordingInfo

    def statistics(self, name: str, device: Any = "cpu", width: int | None = None) -> LayerStatistics:
        """What was recorded under an input name, in double, of a layer with that `width` of inputs if it is given.

        A digest finds damage, and says nothing of who wrote it: shapes and signs are checked too. Raises
        ConceptFileError.
        """
        where = f"{self.file.path}: {shown(name)}"
        stored = {
            kind: self.file.read(f"{kind}:{name}") for kind in (*TENSORS, *PARTS) if f"{kind}:{name}" in self.file
        }
        if name not in self.info.rows or self.info.digests.get(name) != _digest(stored):
            raise ConceptFileError(f"{self.file.path}: damaged: {shown(name)} does not match its digest")
        found: dict[str, Tensor] = {kind: stored.pop(kind) for kind in TENSORS if kind in stored}
        if "moments" not in found:
            try:
                found["moments"] = unpack(stored)
            except (KeyError, RuntimeError, IndexError) as error:
                parts = ", ".join(sorted(stored)) or "none"
                raise ConceptFileError(
                    f"{where}: its parts ({parts}) make no moments; delete it to record again"
                ) from error
        for kind, tensor in found.items():
            if not torch.isfinite(tensor.sum(dtype=torch.float64)):  # the sum of any that is not is not
                raise ConceptFileError(f"{self.file.path}: {kind} of {shown(name)}: values that are not finite")
            found[kind] = tensor.to(device) if kind == "inputs" else tensor.to(device, torch.float64)
        _check_moments(found, self.info.rows[name], width, where)
        return LayerStatistics(**found, rows=self.info.rows[name])


@dataclass(frozen=True)
class HeldRecording:
    """A recording that is in memory only; see `Recording`."""

    seen: Mapping[str, LayerStatistics]

    def statistics(self, name: str, device: Any = "cpu", width: int | None = None) -> LayerStatistics:
        """What was recorded under an input name."""
        return self.seen[name].to(device)


class StatisticsReader:
    """What was recorded of several concepts under one input name, read once for all layers with this input.

    Kept in memory as far as it fits into `KEPT` bytes, so that the number of concepts does not matter.
    """

    def __init__(
        self, recordings: Sequence[Recorded], name: str, device: Any, width: int | None = None
    ) -> None:
        self._recordings, self._name, self._device, self._width = recordings, name, device, width
        self._kept: dict[int, LayerStatistics] = {}
        self._room = KEPT

    def __call__(self, number: int) -> LayerStatistics:
        """Of recording `number`. Raises ConceptFileError."""
        if number in self._kept:
            return self._kept[number]
        seen = self._recordings[number].statistics(self._name, self._device, self._width)
        size = sum(tensor.nbytes for tensor in seen.tensors().values())
        if size <= self._room:
            self._room -= size
            self._kept[number] = seen
        return seen


@dataclass(frozen=True)
class Store:
    """A folder of recordings, made when something is kept. Raises SettingsError for a storage that there is not."""

    folder: Path
    storage: str = "fp64"

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise SettingsError(f"storage: expected one of {', '.join(STORAGES)}, found {shown(self.storage)}")

    def path(self, key: Mapping[str, Any], name: str) -> Path:
        """Where the recording made with `key` is kept."""
        digest = hashlib.sha256(json.dumps([key, self.storage], sort_keys=True).encode()).hexdigest()
        return self.folder / f"{name}-{digest[:16]}.safetensors"

    def find(self, key: Mapping[str, Any], name: str, inputs: set[str]) -> Recording | None:
        """The recording made with `key`, if it is there and holds these inputs. Raises ConceptFileError if damaged."""
        path = self.path(key, name)
        if not path.is_file():
            return None
        recording = open_recording(path)
        if recording.info.key != json.loads(json.dumps(key)):
            raise ConceptFileError(f"{path}: not what its name says; delete it to record again")
        if not inputs <= recording.info.rows.keys():
            return None
        tell_of_threads(self.folder, recording.info.threads or torch.get_num_threads(), torch.get_num_threads())
        return recording

    def save(self, key: Mapping[str, Any], name: str, seen: Mapping[str, LayerStatistics]) -> Recording:
        """Write a recording whole or not at all, and open it. Raises BadInputError for values that are not finite."""
        tensors: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        errors = []
        for input_name, one in seen.items():
            found = one.tensors()
            if not all(torch.isfinite(value).all() for value in found.values()):
                raise BadInputError(
                    f"{name}: in its own model, {input_name} has values that are not finite; leave it out"
                )
            packed = pack(found.pop("moments"), self.storage)
            errors.append(float((unpack(packed) - one.moments).norm() / one.moments.norm().clamp(min=1e-300)))
            found |= packed
            found = {kind: value.cpu() for kind, value in found.items()}
            digests[input_name] = _digest(found)
            tensors |= {f"{kind}:{input_name}": value for kind, value in found.items()}
        info = RecordingInfo(
            key=dict(key),
            storage=self.storage,
            threads=torch.get_num_threads(),
            rows={input_name: one.rows for input_name, one in seen.items()},
            digests=digests,
            error=(sum(errors) / len(errors), max(errors)) if errors else (0.0, 0.0),
        )
        path = self.path(key, name)
        write_tensors(path, tensors, _metadata(json.dumps(info.model_dump(), sort_keys=True)), limit=None)
        return open_recording(path)


class Scratch:
    """In place of a store, for one fusion: nothing is found again, and what fits into `room` bytes is kept in memory."""

    def __init__(self, folder: Path, room: int) -> None:
        self._store, self._room = Store(folder), room

    def find(self, key: Mapping[str, Any], name: str, inputs: set[str]) -> None:
        """Nothing, whatever was recorded."""

    def save(self, key: Mapping[str, Any], name: str, seen: Mapping[str, LayerStatistics]) -> Recorded:
        """As it is, or in a file if there is no room left."""
        size = sum(tensor.nbytes for one in seen.values() for tensor in one.tensors().values())
        if size > self._room:
            return self._store.save(key, name, seen)
        self._room -= size
        return HeldRecording({input_name: one.to("cpu") for input_name, one in seen.items()})


@functools.cache
def tell_of_threads(where: Path, before: int, now: int) -> None:
    """Say, once for each place, that what is there was computed with another number of threads."""
    if before != now:
        logger.warning("%s: made with %d threads, now there are %d: the last digits may differ", where, before, now)


def _digest(stored: Mapping[str, Tensor]) -> str:
    """16 hex digits of the tensors stored of one input, by kind."""
    digest = hashlib.sha256()
    for kind, tensor in sorted(stored.items()):
        digest.update(f"{kind} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()[:16]


def _metadata(text: str) -> dict[str, str]:
    return {"format": "pt", METADATA_KEY: text, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}


def open_recording(path: Path) -> Recording:
    """Open a file and check what it says of itself. Raises ConceptFileError."""
    file = TensorFile(path)
    try:
        text = file.metadata[METADATA_KEY]
        info = RecordingInfo.model_validate(parse_json(text, str(path), ConceptFileError, finite=False))
        if file.metadata != _metadata(text):
            raise ValueError("damaged: its description does not match the digest written in it")
    except (KeyError, ValueError) as error:
        problem = field_problem(error.errors()[0], ()) if isinstance(error, ValidationError) else shown(error)
        raise ConceptFileError(f"{path}: not a recording of this version ({problem})") from error
    return Recording(file, info)


PARTS: Final = ("plain", "scaled", "scale", "factor", "diagonal")


def pack(moments: Tensor, storage: str) -> dict[str, Tensor]:
    """Moments (in, in) as they are stored: whole, as correlations in half precision, or as low rank plus diagonal."""
    if storage in ("fp64", "fp32"):
        return {"plain": moments.to(torch.float64 if storage == "fp64" else torch.float32)}
    if storage == "fp16":
        scale = moments.diagonal().sqrt()
        safe = torch.where(scale > 0, scale, 1)
        return {"scaled": (moments / safe[:, None] / safe).half(), "scale": scale.float()}
    values, vectors = torch.linalg.eigh(moments)
    rank = max(1, len(moments) // RANK_SHARE)
    factor = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
    rest = moments.diagonal() - factor.square().sum(1)
    return {"factor": factor.float(), "diagonal": rest.clamp(min=0).float()}


def unpack(packed: Mapping[str, Tensor]) -> Tensor:
    """Moments (in, in) in double from their stored parts."""
    parts = {name: part.double() for name, part in packed.items()}
    if "plain" in parts:
        return parts["plain"]
    if "scaled" in parts:
        return parts["scaled"] * parts["scale"][:, None] * parts["scale"]
    return parts["factor"] @ parts["factor"].T + parts["diagonal"].diag()


def _check_moments(found: Mapping[str, Tensor], rows: int, width: int | None, where: str) -> None:
    """Raise ConceptFileError for what cannot be second moments: not square, of another width, negative."""
    width = found["moments"].shape[-1] if width is None else width
    for kind, tensor in found.items():
        expected = (rows, width) if kind == "inputs" else (width, width)
        if tuple(tensor.shape) != expected:
            raise ConceptFileError(f"{where}: {kind}: expected {expected}, found {tuple(tensor.shape)}")
        if kind == "moments" and ((own := tensor.diagonal()) < 0).any():
            raise ConceptFileError(f"{where}: {kind}: sums of squares that are negative ({own.min():.3g})")
