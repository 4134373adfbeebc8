"""Concepts for other tools: a folder with a LoRA, one embedding per word, and a model card.

The LoRA holds the concept's weight changes exactly, with alpha equal to rank so that there is nothing to multiply by.
What no other tool knows is one vector per word *and layer*: it gets their mean, and the card says what that loses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from mixofshow.bases.families import of_encoders, text_encoders
from mixofshow.bases.layers import layer
from mixofshow.concepts.changes import DOWN, UP, Change, LowRank
from mixofshow.concepts.concept import Concept
from mixofshow.concepts.delta import Compression, compressed
from mixofshow.concepts.interchange.adapter_keys import kohya_name
from mixofshow.concepts.interchange.cards import kohya_metadata, model_card
from mixofshow.concepts.interchange.embeddings import TABLES
from mixofshow.errors import SettingsError
from mixofshow.files import write_tensors
from mixofshow.outputs import write_text, writing_folder

EXACT: Final = 1e-6
"""Largest relative error of a change that counts as exported exactly."""
DIFFUSERS_LORA: Final = "pytorch_lora_weights.safetensors"
"""The name that `load_lora_weights` looks for in a folder."""


@dataclass(frozen=True)
class Exported:
    """What a folder holds and what was lost: `words`, of each word how far its layers' vectors are from their mean."""

    lora: str
    embeddings: str
    words: Mapping[str, float]
    changes: Compression


def export_concept(concept: Concept, pipeline: Any, folder: Path, to: str, rank: int | None = None) -> Exported:
    """Write a folder for `diffusers` or `kohya`; `rank` cuts all changes to it. Raises SettingsError.

    Without a rank, changes in full are exported if they have a low rank.
    """
    factors, lost = low_rank_changes(concept.deltas, rank)
    vectors, words = mean_vectors(concept)
    target = TARGETS[to](concept, pipeline, factors)
    exported = Exported(target.lora, f"{concept.info.name}-words.safetensors", words, lost)
    with writing_folder(folder) as temporary:
        if factors:
            write_tensors(temporary / target.lora, target.tensors, target.metadata)
        tables = _tables(pipeline, target.word, vectors)
        write_tensors(temporary / exported.embeddings, tables, {"format": "pt"})
        card = model_card(
            concept, to, lora=target.lora, embeddings=exported.embeddings, words=words, lost=lost, tables=len(tables)
        )
        write_text(temporary / "README.md", card)
    return exported


def _tables(pipeline: Any, word: str, vectors: Tensor) -> dict[str, Tensor]:
    """Vectors (words, dim) under the word, or those of several text encoders each under its own name."""
    parts = of_encoders(pipeline, vectors)
    names = (word,) if len(parts) == 1 else TABLES
    return {name: _compact(part).contiguous() for name, part in zip(names, parts, strict=True)}


def mean_vectors(concept: Concept) -> tuple[Tensor, dict[str, float]]:
    """Each word's mean over the layers, (words, dim), and ‖vectors − mean‖ / ‖vectors‖: 0 for one vector for all layers."""
    mean = concept.embeddings.mean(1)
    apart = (concept.embeddings - mean[:, None]).flatten(1).norm(dim=1) / concept.embeddings.flatten(1).norm(dim=1)
    return mean, dict(zip(concept.info.words, apart.nan_to_num().tolist(), strict=True))


def low_rank_changes(deltas: Mapping[str, Change], rank: int | None) -> tuple[dict[str, LowRank], Compression]:
    """Every change as two factors, and what cutting them lost. Raises SettingsError for a change of full rank."""
    kept = {name: one for name, one in deltas.items() if isinstance(one, LowRank) and _has_rank(one, rank)}
    rest = ((name, one.matrix(dtype=torch.float64)) for name, one in deltas.items() if name not in kept)
    cut, lost = compressed(rest, cut=lambda name, change: _factored(name, change, rank))
    factors = kept | {name: one for name, one in cut.items() if isinstance(one, LowRank)}
    return {name: factors[name] for name in deltas}, lost


def _has_rank(change: LowRank, rank: int | None) -> bool:
    return rank is None or change.down.shape[0] <= rank


def _factored(name: str, change: Tensor, rank: int | None) -> LowRank:
    """By singular values (Eckart–Young), to `rank`, or to the rank that the change has."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    if rank is None:
        tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[r]: what cutting to rank r loses
        rank = max(1, int((tails > EXACT / 2 * tails[0]).sum()))  # half, because factors are rounded too
        if rank * sum(change.shape) >= change.numel():
            raise SettingsError(
                f"rank: the change of '{name}' is of rank {rank}, no low one, and a LoRA of it would only be larger; "
                "give a rank to cut it to"
            )
    root = values[:rank].sqrt()
    return LowRank(down=(root[:, None] * right[:rank]).float(), up=(left[:, :rank] * root).float())


@dataclass(frozen=True)
class _Target:
    """What one tool reads: the LoRA file's name, tensors and metadata, and what an embedding is called in its file."""

    lora: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    word: str


def _for_diffusers(concept: Concept, pipeline: Any, factors: Mapping[str, LowRank]) -> _Target:
    tensors = {}
    for name, change in factors.items():
        tensors[name + DOWN], tensors[name + UP] = _shaped(change, pipeline, name)
    return _Target(DIFFUSERS_LORA, tensors, {"format": "pt"}, f"<{concept.info.name}>")


def _for_kohya(concept: Concept, pipeline: Any, factors: Mapping[str, LowRank]) -> _Target:
    two, tensors = len(text_encoders(pipeline)) > 1, {}
    for name, change in factors.items():
        key = kohya_name(name, two_encoders=two)
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = _shaped(change, pipeline, name)
        tensors[f"{key}.alpha"] = torch.tensor(float(change.down.shape[0]))
    ranks = {change.down.shape[0] for change in factors.values()}
    metadata = kohya_metadata(concept, pipeline, ranks, _hash(tensors))
    return _Target(f"{concept.info.name}.safetensors", tensors, metadata, "emb_params")


TARGETS: Final[dict[str, Callable[[Concept, Any, Mapping[str, LowRank]], _Target]]] = {
    "diffusers": _for_diffusers,
    "kohya": _for_kohya,
}


def _shaped(change: LowRank, pipeline: Any, name: str) -> tuple[Tensor, Tensor]:
    """Both halves, with the two dimensions more that those of a convolution have: in `down` its kernel."""
    weight: Any = layer(pipeline, name).weight
    points = (1,) * (weight.ndim - 2)
    return (
        _compact(change.down).reshape(-1, *weight.shape[1:]),
        _compact(change.up).reshape(*change.up.shape, *points),
    )


def _compact(tensor: Tensor) -> Tensor:
    """In half precision where that is exact, as it is for what came from a concept file; else in single."""
    half = tensor.detach().half().cpu()
    return half if torch.equal(half.float(), tensor.detach().float().cpu()) else tensor.detach().float().cpu()


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a safetensors file's numbers alone, by which kohya's scripts and modelspec tell models apart."""
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
