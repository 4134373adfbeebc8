"""The change of one layer's weight, as two factors or in full, and what it is in a file.

Here a change is a matrix, (out, in). That of a convolution is its weight with the kernel laid flat, (out, in · height ·
width), as `Tensor.flatten(1)` has it; `kernel` says how large it is, so that a file has the shapes that other tools know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.bases.layers import kernel_of, matrix, tunable_layers
from mixofshow.errors import shown

DOWN, UP, FULL = ".lora_A.weight", ".lora_B.weight", ".diff"
Kernel = tuple[int, ...]
"""Height and width of a convolution's kernel; of a linear layer and of a 1×1 convolution nothing."""
_POINT: Final = (1, 1)


def inner(one: Tensor, other: Tensor) -> float:
    """⟨A, B⟩: the sum of the products of two matrices' entries, without a third in memory."""
    return float(torch.dot(one.flatten(), other.flatten()))


@dataclass(frozen=True)
class LowRank:
    """The change of one layer's weight, `up @ down`: down (rank, in), up (out, rank); alpha is already in `up`."""

    down: Tensor
    up: Tensor
    kernel: Kernel = ()

    @classmethod
    def of(cls, down: Tensor, up: Tensor) -> LowRank:
        """Of tensors as files have them: of a convolution (rank, in, height, width) and (out, rank, 1, 1).

        Raises ValueError when they do not fit together.
        """
        kernel = _kernel(down)
        if _kernel(up) or 0 in (*down.shape, *up.shape) or down.shape[0] != up.shape[1]:
            raise ValueError(f"down {tuple(down.shape)} and up {tuple(up.shape)} do not fit together")
        return cls(down.flatten(1), up.flatten(1), kernel)

    def matrix(self, strength: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """The change as a matrix, (out, in)."""
        return strength * (self.up.to(dtype) @ self.down.to(dtype))

    def scaled(self, strength: float) -> LowRank:
        """The change at another strength."""
        return replace(self, up=strength * self.up)

    def times(self, moments: Tensor) -> LowRank:
        """ΔW C for C (in, in), in its precision."""
        return LowRank(self.down.to(moments) @ moments, self.up.to(moments))

    def inner(self, matrix: Tensor) -> float:
        """⟨ΔW, M⟩ for M (out, in) of its precision."""
        return inner(self.down, self.up.T @ matrix)

    def add_to(self, sums: Tensor, weight: float) -> None:
        """Add the change, `weight` times, to a matrix (out, in)."""
        sums.addmm_(self.up.to(sums), self.down.to(sums), alpha=weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def is_nothing(self) -> bool:
        """Whether a factor is 0 throughout."""
        return not (self.up.any() and self.down.any())

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Its tensors by their names in the file."""
        up = self.up[..., None, None] if self.kernel else self.up
        return {layer + DOWN: _as_kernel(self.down, self.kernel), layer + UP: up}


@dataclass(frozen=True)
class Full:
    """The change of one layer's weight as it is, (out, in): of methods that train whole layers."""

    change: Tensor
    kernel: Kernel = ()

    @classmethod
    def of(cls, change: Tensor) -> Full:
        """Of a tensor as files have it: of a convolution (out, in, height, width). Raises ValueError for no weight."""
        kernel = _kernel(change)
        if 0 in change.shape:
            raise ValueError(f"expected (out, in), found {tuple(change.shape)}")
        return cls(change.flatten(1), kernel)

    def matrix(self, strength: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """The change as a matrix, (out, in)."""
        return strength * self.change.to(dtype)

    def scaled(self, strength: float) -> Full:
        """The change at another strength."""
        return replace(self, change=strength * self.change)

    def times(self, moments: Tensor) -> Full:
        """ΔW C for C (in, in), in its precision."""
        return Full(self.change.to(moments) @ moments)

    def inner(self, matrix: Tensor) -> float:
        """⟨ΔW, M⟩ for M (out, in) of its precision."""
        return inner(self.change, matrix)

    def add_to(self, sums: Tensor, weight: float) -> None:
        """Add the change, `weight` times, to a matrix (out, in)."""
        sums.add_(self.change.to(sums), alpha=weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return self.change.shape[0], self.change.shape[1]

    @property
    def is_nothing(self) -> bool:
        """Whether it is 0 throughout."""
        return not self.change.any()

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Its tensors by their names in the file."""
        return {layer + FULL: _as_kernel(self.change, self.kernel)}


Change = LowRank | Full


def _kernel(weight: Tensor) -> Kernel:
    """Of a weight as files have it, of a linear layer or convolution. Raises ValueError for what is neither."""
    if weight.ndim not in (2, 4):
        raise ValueError(f"expected 2 or 4 dimensions, found shape {tuple(weight.shape)}")
    kernel = tuple(weight.shape[2:])
    return () if kernel == _POINT else kernel


def _as_kernel(matrix: Tensor, kernel: Kernel) -> Tensor:
    """(rows, in · height · width) -> (rows, in, height, width); without a kernel as it is."""
    return matrix.unflatten(1, (-1, *kernel)) if kernel else matrix


def read_changes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Change], list[str]]:
    """Changes by layer from a file's tensors, and what is wrong with those, a line for each."""
    problems: list[str] = []
    deltas: dict[str, Change] = {}
    for key, tensor in tensors.items():
        layer = key.removesuffix(DOWN).removesuffix(UP).removesuffix(FULL)
        try:
            if key == layer + FULL:
                if layer + DOWN in tensors:
                    raise ValueError("two factors and the change in full, expected one of them")
                deltas[layer] = _stored_as(Full.of(tensor), layer, tensors)
            elif layer == key:
                problems.append(f"tensor '{shown(key)}' is not known")
            elif layer + DOWN not in tensors or layer + UP not in tensors:
                problems.append(f"tensor '{shown(key)}' stands alone, its other half is missing")
            elif key.endswith(DOWN):
                deltas[layer] = _stored_as(LowRank.of(tensor, tensors[layer + UP]), layer, tensors)
        except ValueError as error:
            problems.append(f"layer '{shown(layer)}': {error}")
    return deltas, problems


def _stored_as(change: Change, layer: str, tensors: Mapping[str, Tensor]) -> Change:
    """The change itself, or ValueError unless it would be stored in the shapes that are found: one has one file."""
    for key, tensor in change.tensors(layer).items():
        if tensor.shape != tensors[key].shape:
            raise ValueError(f"expected {tuple(tensor.shape)}, found {tuple(tensors[key].shape)}")
    return change


def layer_problems(deltas: Mapping[str, Change], pipeline: Any) -> list[str]:
    """Where changes do not fit the base's layers, a line for each."""
    problems, known = [], tunable_layers(pipeline)
    for layer, delta in deltas.items():
        if layer not in known:
            problems.append(f"layer '{shown(layer)}' is not in this base")
            continue
        expected, kernel = tuple(matrix(known[layer]).shape), kernel_of(known[layer])
        if delta.shape != expected:
            problems.append(f"layer '{layer}': expected (out, in) = {expected}, found {delta.shape}")
        elif delta.kernel not in ((), kernel):
            problems.append(f"layer '{layer}': expected a kernel of {kernel}, found {delta.kernel}")
        elif isinstance(delta, LowRank) and delta.down.shape[0] > min(expected):
            problems.append(f"layer '{layer}': rank {delta.down.shape[0]} is more than the layer's own {min(expected)}")
    return problems
