"""Kinds of adapter, each as the exact change that it makes of a layer's weight.

kind            tensors of a layer                        change, W being the base's weight
LoRA, LoCon     down, up                                  s · up · down
LoCon, Tucker   down, mid, up                             s · up · mid · down
LoHa            hada_w1_a, …w1_b, …w2_a, …w2_b            s · (w1_a · w1_b) ∘ (w2_a · w2_b)
LoKr            lokr_w1, lokr_w2, or two factors of each  s · w1 ⊗ w2
full            diff                                      diff
DoRA            any of these, and a magnitude m           m · (W + change) / ‖W + change‖ − W

(LoCon, LoHa, LoKr: Yeh et al. 2023, arXiv:2309.14859; DoRA: Liu et al. 2024, arXiv:2402.09353.) The scale s is alpha
over the rank. A Tucker core (rank, rank, height, width) stands between two factors that are then (rank, out), (rank, in).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from mixofshow.concepts.changes import Change, Full, LowRank

Parts = Mapping[str, Tensor]
"""The tensors of one layer, by what they are of it."""
Scale = Callable[[int | None], float]
"""The scale of a layer whose adapter has this rank; None: its matrices are whole."""

_TELLING: Final = {
    kind: re.compile(names)
    for kind, names in {"LoRA": "down|mid|up", "LoHa": "hada_.+", "LoKr": "lokr_.+", "full": "diff"}.items()
}
"""What each kind's tensors are called."""


def change_of(parts: Parts, scale: Scale, weight: Tensor) -> Change:
    """The change of a layer whose own weight is `weight`, of any kind. Raises ValueError when the tensors make none."""
    parts = {name: tensor.float() for name, tensor in parts.items() if name != "alpha"}
    magnitude = parts.pop("dora_scale", None)
    per_output = magnitude is not None and magnitude.shape[:1] == weight.shape[:1]
    if "lora_magnitude_vector" in parts:
        magnitude, per_output = parts.pop("lora_magnitude_vector"), True
    change = _plain(parts, scale, weight)
    return change if magnitude is None else _decomposed(change, magnitude, weight, per_output=per_output)


def _plain(parts: Parts, scale: Scale, weight: Tensor) -> Change:
    kinds = {kind for name in parts for kind, names in _TELLING.items() if names.fullmatch(name)}
    if len(kinds) > 1:
        raise ValueError(f"parts of several kinds of adapter at once: {', '.join(sorted(kinds))}")
    if flat := [f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items() if tensor.ndim < 2]:
        raise ValueError(f"expected at least 2 dimensions of each part, found {flat[0]}")
    try:
        if "diff" in parts:
            return Full.of(parts["diff"])
        if any(name.startswith("hada") for name in parts):
            return _loha(parts, scale, weight)
        if any(name.startswith("lokr") for name in parts):
            return _lokr(parts, scale, weight)
        if "down" not in parts or "up" not in parts:
            raise ValueError(f"expected a lower and an upper half, found {', '.join(sorted(parts))}")
        return _lora(parts, scale)
    except KeyError as error:
        raise ValueError(f"expected a tensor {error}, found {', '.join(sorted(parts))}") from error
    except RuntimeError as error:  # of a matrix product
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(parts.items()))
        raise ValueError(f"{shapes} do not fit together, or not the layer's {tuple(weight.shape)}") from error


def _lora(parts: Parts, scale: Scale) -> Change:
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = torch.einsum("ijkl,jc->ickl", parts["mid"], down.flatten(1))
    halves = LowRank.of(down, up)
    change = halves.scaled(scale(len(parts["down"])))
    if len(halves.down) > min(change.shape):
        return Full(change.matrix(), change.kernel)
    return _balanced(change)


def _balanced(change: LowRank) -> LowRank:
    """Both halves about equally large, by a power of two, which is exact: in a file's half precision neither fades."""
    sizes = float(change.down.abs().max()), float(change.up.abs().max())
    if min(sizes) == 0 or not math.isfinite(sum(sizes)):
        return change
    shift = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    return LowRank(change.down * shift, change.up / shift, change.kernel)


def _loha(parts: Parts, scale: Scale, weight: Tensor) -> Change:
    rank = len(parts["hada_w1_b"])
    if "hada_t1" not in parts and weight.ndim == 2 and rank**2 * sum(weight.shape) < weight.numel():
        # (A₁B₁) ∘ (A₂B₂) is a product too, of the pairs' products: of columns on the left, of rows on the right.
        down = torch.einsum("ri,si->rsi", parts["hada_w1_b"], parts["hada_w2_b"]).flatten(0, 1)
        up = torch.einsum("or,os->ors", parts["hada_w1_a"], parts["hada_w2_a"]).flatten(1)
        return _balanced(LowRank.of(down, scale(rank) * up))
    one, two = (_product(parts, f"hada_w{number}", f"hada_t{number}") for number in (1, 2))
    return _in_full(scale(rank) * one * two, weight)


def _lokr(parts: Parts, scale: Scale, weight: Tensor) -> Change:
    one = parts["lokr_w1"] if "lokr_w1" in parts else _product(parts, "lokr_w1")
    two = parts["lokr_w2"] if "lokr_w2" in parts else _product(parts, "lokr_w2", "lokr_t2")
    ranks = [len(parts[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
    one = one[(..., *[None] * (two.ndim - one.ndim))]
    return _in_full(scale(ranks[0] if ranks else None) * torch.kron(one.contiguous(), two.contiguous()), weight)


def _in_full(change: Tensor, weight: Tensor) -> Full:
    """The change of a convolution may have its kernel laid flat. Raises ValueError for that of another layer's shape."""
    expected = tuple(weight.flatten(1).shape)
    if (found := tuple(change.flatten(1).shape)) != expected:
        raise ValueError(f"expected (out, in) = {expected}, found {found}")
    return Full.of(change.reshape(weight.shape))


def _product(parts: Parts, name: str, core: str = "") -> Tensor:
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        return torch.einsum("ij...,io,jc->oc...", parts[core], left, right)
    return left @ right


def _decomposed(change: Change, magnitude: Tensor, weight: Tensor, *, per_output: bool) -> Change:
    """What is left of the change once every output's weights (or input's) have the length that `magnitude` says."""
    own = weight.detach().cpu().double()
    if change.shape != tuple(own.flatten(1).shape):
        raise ValueError(f"expected (out, in) = {tuple(own.flatten(1).shape)}, found {change.shape}")
    merged = own + change.matrix(dtype=torch.float64).reshape(own.shape)
    kept = 0 if per_output else 1
    norm = torch.linalg.vector_norm(merged, dim=[axis for axis in range(own.ndim) if axis != kept], keepdim=True)
    if magnitude.numel() != norm.numel():
        raise ValueError(f"expected {norm.numel()} magnitudes, found {magnitude.numel()}")
    scaled = merged * magnitude.double().reshape(norm.shape) / norm.clamp(min=torch.finfo(torch.float32).tiny)
    return Full.of((scaled - own).float())
