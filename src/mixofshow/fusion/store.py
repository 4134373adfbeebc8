"""Recordings in files: what was recorded of one concept, kept for later fusions or from other machines.

A file is found again by what made it: the concept's content, the base model, the prompts, seeds and steps. Only one
layer's numbers are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from mixofshow.errors import ConceptFileError, SettingsError, shown
from mixofshow.files import TensorFile, write_tensors
from mixofshow.fusion.statistics import TENSORS, Seen

Storage = Literal["fp64", "fp32", "fp16", "low-rank"]
METADATA_KEY: Final = "mixofshow_recording"
FORMAT_VERSION: Final = 1
RANK_SHARE: Final = 8
"""Low-rank storage keeps the largest eighth of the eigenvalues, and of the rest the diagonal."""


@dataclass(frozen=True)
class Recording:
    """A recording's file: `look(input name)` reads what a layer saw."""

    file: TensorFile
    rows: Mapping[str, int]
    about: Mapping[str, Any]

    def look(self, name: str, device: Any = "cpu") -> Seen:
        """What was recorded under an input name, in double. Raises ConceptFileError."""
        found = {kind: self.file.read(f"{kind}:{name}") for kind in TENSORS if f"{kind}:{name}" in self.file}
        packed = {part: self.file.read(f"{part}:{name}") for part in PARTS if f"{part}:{name}" in self.file}
        if packed:
            found["moments"] = unpack(packed)
        for kind, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise ConceptFileError(f"{self.file.path}: {kind} of {shown(name)}: values that are not finite")
            found[kind] = tensor.to(device) if kind == "inputs" else tensor.to(device, torch.float64)
        return Seen(**found, rows=self.rows[name])


@dataclass(frozen=True)
class Store:
    """A folder of recordings."""

    folder: Path
    storage: Storage = "fp64"

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
        if recording.about["key"] != json.loads(json.dumps(key)):
            raise ConceptFileError(f"{path}: not what its name says; delete it to record again")
        return recording if inputs <= recording.rows.keys() else None

    def keep(self, key: Mapping[str, Any], name: str, seen: Mapping[str, Seen]) -> Recording:
        """Write a recording whole or not at all, and open it."""
        tensors: dict[str, Tensor] = {}
        for input_name, one in seen.items():
            found = {kind: value for kind in TENSORS if (value := getattr(one, kind)) is not None}
            if one.drifted is None:
                found |= pack(found.pop("moments"), self.storage)
            tensors |= {f"{kind}:{input_name}": value.cpu() for kind, value in found.items()}
        about = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "storage": self.storage,
            "rows": {input_name: one.rows for input_name, one in seen.items()},
        }
        path = self.path(key, name)
        write_tensors(path, tensors, {"format": "pt", METADATA_KEY: json.dumps(about, sort_keys=True)})
        return open_recording(path)


def open_recording(path: Path) -> Recording:
    """Open a file and check what it says of itself. Raises ConceptFileError."""
    file = TensorFile(path)
    try:
        about = json.loads(file.metadata[METADATA_KEY])
        rows = {str(name): int(count) for name, count in about["rows"].items()}
        if about["format_version"] > FORMAT_VERSION or not isinstance(about["key"], dict):
            raise ValueError(f"format {about['format_version']}")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConceptFileError(f"{path}: not a recording of this version ({shown(error)})") from error
    return Recording(file, rows, about)


PARTS: Final = ("plain", "scaled", "scale", "factor", "diagonal")


def pack(moments: Tensor, storage: Storage) -> dict[str, Tensor]:
    """Moments (in, in) as they are stored: whole, as correlations in half precision, or as low rank plus diagonal.

    Raises SettingsError.
    """
    if storage in ("fp64", "fp32"):
        return {"plain": moments.to(torch.float64 if storage == "fp64" else torch.float32)}
    if storage == "fp16":
        scale = moments.diagonal().sqrt()
        safe = torch.where(scale > 0, scale, 1)
        return {"scaled": (moments / safe[:, None] / safe).half(), "scale": scale.float()}
    if storage != "low-rank":
        raise SettingsError(f"storage: expected one of {', '.join(get_args(Storage))}, found {shown(storage)}")
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


def storage_error(seen: Mapping[str, Seen], storage: Storage) -> tuple[float, float]:
    """What storing changes: mean and largest ‖C' − C‖ / ‖C‖ over the inputs."""
    errors = [
        float((unpack(pack(one.moments, storage)) - one.moments).norm() / one.moments.norm().clamp(min=1e-300))
        for one in seen.values()
    ]
    return sum(errors) / len(errors), max(errors)
