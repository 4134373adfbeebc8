"""A fused model as one file: what it changes of the base, to be put on the base again when it is loaded.

In it are the layers' changes W − W0, in full or cut to a rank, and the words. Nothing of the base is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from mixofshow.bases.layers import layer, matrix
from mixofshow.bases.loading import fingerprint
from mixofshow.bases.parts import exclusive
from mixofshow.concepts.changes import Change, Full, LowRank, layer_problems, read_changes
from mixofshow.concepts.concept import DELTA_KEY, DIGEST_KEY, raise_if, value_problems
from mixofshow.concepts.concept import METADATA_KEY as CONCEPT_KEY
from mixofshow.errors import ConceptFileError, SettingsError, field_problem, shown
from mixofshow.files import raw, read_tensors, write_tensors
from mixofshow.reading import parse_json
from mixofshow.tables import Group

FORMAT_VERSION: Final = 1
WORD: Final = "word:"


class DeltaInfo(Group):
    """A delta file's metadata; `manifest` is the fused model's."""

    format_version: int = Field(FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    base: str = Field(max_length=128)
    base_fingerprint: str
    words: tuple[str, ...] = ()
    aliases: dict[str, tuple[str, ...]] = Field({})
    manifest: dict[str, Any] = Field({})


@dataclass(frozen=True)
class Delta:
    """A fused model without its base: `vectors` (layers, dim) of each word, and the layers' changes by name."""

    info: DeltaInfo
    vectors: Mapping[str, Tensor]
    changes: Mapping[str, Change]

    def save(self, path: Path) -> None:
        """Write the file whole or not at all, in single precision. Raises ConceptFileError as `load_delta` would."""
        named = {WORD + word: vector for word, vector in self.vectors.items()}
        for name, change in self.changes.items():
            named |= change.tensors(name)
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in named.items()}
        text = self.info.model_dump_json()
        metadata = {"format": "pt", DELTA_KEY: text, DIGEST_KEY: _digest(tensors, text)}
        _read(dict(tensors), metadata, f"{path}: not written")
        write_tensors(path, tensors, metadata)

    @torch.no_grad()
    def weights(self, pipeline: Any) -> dict[str, Tensor]:
        """The changed layers' weights on this base, W0 + change, (out, in)."""
        weights = {}
        with exclusive(pipeline):
            for name, change in self.changes.items():
                base = matrix(layer(pipeline, name))
                # In double precision, so that a change in full gives the weight back.
                weights[name] = (base.cpu().double() + change.matrix(dtype=torch.float64)).to(base)
        return weights

    def check_fits(self, pipeline: Any, name: str) -> None:
        """Raise ConceptFileError unless the file `name` was made on this base, with these layers and shapes."""
        raise_if(layer_problems(self.changes, pipeline), name)
        if self.info.base_fingerprint != (found := fingerprint(pipeline)):
            raise ConceptFileError(
                f"{name}: made on base '{shown(self.info.base)}' ({shown(self.info.base_fingerprint)}), "
                f"this base is {found}; nothing was changed"
            )


@dataclass(frozen=True)
class Compression:
    """What cutting changes to a rank lost: ‖change − cut‖ / ‖change‖ over all layers, and in the worst `layer`."""

    overall: float = 0.0
    worst: float = 0.0
    layer: str = ""


def compressed(
    changes: Iterable[tuple[str, Tensor]],
    rank: int | None = None,
    *,
    cut: Callable[[str, Tensor], Change] | None = None,
) -> tuple[dict[str, Change], Compression]:
    """Changes (out, in) by layer as they are stored: in full, or cut to the nearest matrix of a rank where that is less.

    `cut` stores each layer's in another way. Raises SettingsError for a rank below 1.
    """
    if rank is not None and rank < 1:
        raise SettingsError(f"rank: expected at least 1, found {rank}")
    kept: dict[str, Change] = {}
    lost = wanted = 0.0
    errors = {"": 0.0}
    for name, change in changes:
        kept[name] = cut(name, change) if cut else _cut(change, rank)
        left = float((kept[name].matrix(dtype=torch.float64) - change).square().sum())
        energy = float(change.double().square().sum())
        lost, wanted = lost + left, wanted + energy
        errors[name] = _relative(left, energy)
    worst = max(errors, key=errors.__getitem__)
    return kept, Compression(_relative(lost, wanted), errors[worst], worst)


def _relative(lost: float, wanted: float) -> float:
    return math.sqrt(lost / wanted) if wanted > 0 else 0.0


def _cut(change: Tensor, rank: int | None) -> Change:
    """By singular values (Eckart–Young); in full where the factors would be no smaller."""
    if rank is None or rank * sum(change.shape) >= change.numel():
        return Full(change.float())
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return LowRank(down=(root[:, None] * right[:rank]).float(), up=(left[:, :rank] * root).float())


def load_delta(path: Path) -> Delta:
    """Read a delta file and check all that can be checked without the base. Raises ConceptFileError."""
    return _read(*read_tensors(path), str(path))


def _read(tensors: dict[str, Tensor], metadata: Mapping[str, str], name: str) -> Delta:
    info = _read_info(metadata, name)
    raise_if(value_problems(tensors), name)
    if metadata.get(DIGEST_KEY) != _digest(tensors, metadata[DELTA_KEY]):
        raise ConceptFileError(f"{name}: damaged: its content does not match the digest written in it")
    vectors = {name.removeprefix(WORD): tensors.pop(name) for name in list(tensors) if name.startswith(WORD)}
    changes, problems = read_changes(tensors)
    raise_if(problems, name)
    return Delta(info, vectors, changes)


def _read_info(metadata: Mapping[str, str], name: str) -> DeltaInfo:
    text = metadata.get(DELTA_KEY)
    if text is None and CONCEPT_KEY in metadata:
        raise ConceptFileError(f"{name}: a concept, not a model; draw it on a base, as its `concept`, or fuse it")
    if text is None:
        raise ConceptFileError(f"{name}: not a delta file, its metadata has no '{DELTA_KEY}'")
    try:
        return DeltaInfo.model_validate(parse_json(text, f"{name}: metadata", ConceptFileError))
    except ValidationError as error:
        problem = field_problem(error.errors()[0], DeltaInfo.model_fields)
        raise ConceptFileError(f"{name}: metadata field {problem}") from error


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Hex digits over the metadata and all numbers; it finds damage, and does not prove who wrote the file."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(raw(tensor.float()))
    return digest.hexdigest()
