"""What fusion needs to know of a layer's inputs: second moments, summed in a stream.

For the rows x of a layer's input X_i (rows, in) only C_i = X_iᵀ X_i (in, in) is kept, in double precision, so memory
grows neither with steps nor resolution. Layers that read the same input (query, key and value of one self-attention)
share one C.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixofshow.errors import BadInputError, BaseModelError

_SHARED_INPUT: Final = re.compile(r"(attn1\.to_[qkv]|attn2\.to_[kv]|self_attn\.[qkv]_proj)$")
TENSORS: Final = ("moments", "drifted", "cross", "inputs")
CHUNK: Final = 8192
"""Rows that are turned to double precision at a time."""


def input_of(layer: str) -> str:
    """The name of a layer's input; layers that read the same tensor have one name."""
    return _SHARED_INPUT.sub(lambda match: match.group().rsplit(".", 1)[0] + ".input", layer)


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer saw of one concept.

    moments C = XᵀX, (in, in), of `rows` rows. In drift refinement X are the inputs in the concept's own model and X̃
    those in the fused model on the same pictures, row by row: drifted X̃ᵀX̃ and cross XᵀX̃, (in, in). `inputs` is X
    itself, (rows, in), kept only for methods that cannot do without.
    """

    moments: Tensor
    rows: int
    drifted: Tensor | None = None
    cross: Tensor | None = None
    inputs: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: value for name in TENSORS if (value := getattr(self, name)) is not None}


class MomentAccumulator:
    """Second moments of the inputs of some layers, by input name, while they are counted."""

    def __init__(self, *, keep_inputs: bool = False) -> None:
        self.keep_inputs = keep_inputs
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._inputs: dict[str, list[Tensor]] = {}
        self._rows: dict[str, int] = {}

    def add(self, name: str, inputs: Tensor, drifted: Tensor | None = None) -> None:
        """Count in some rows, (..., in) or, from a 1×1 convolution, (batch, in, height, width); and their drifted pairs."""
        own, other = _flat(inputs), None if drifted is None else _flat(drifted)
        sums = self._sums.setdefault(name, {})
        for start in range(0, len(own), CHUNK):
            x = _double(name, own[start : start + CHUNK])
            _count(sums, "moments", x, x)
            if other is not None:
                y = _double(name, other[start : start + CHUNK])
                _count(sums, "drifted", y, y)
                _count(sums, "cross", x, y)
        if self.keep_inputs:
            self._inputs.setdefault(name, []).append(own.clone())
        self._rows[name] = self._rows.get(name, 0) + len(own)

    def seen(self) -> dict[str, LayerStatistics]:
        """What was counted, by input name."""
        return {
            name: LayerStatistics(
                **sums, rows=self._rows[name], inputs=torch.cat(self._inputs[name]) if self.keep_inputs else None
            )
            for name, sums in self._sums.items()
        }

    @contextlib.contextmanager
    def recording(self, layers: Mapping[str, nn.Module], drifted: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Inside, every call of these layers is counted in, with its pair taken out of `drifted`."""

        def count(name: str, module: nn.Module, inputs: Tensor) -> None:
            pair = None if drifted is None else rows_of(module, drifted.pop(name))
            self.add(name, rows_of(module, inputs), pair)

        with _reading(layers, count):
            yield


@contextlib.contextmanager
def holding(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside, the inputs of one call of each of these layers are kept, by input name."""
    held: dict[str, Tensor] = {}
    with _reading(layers, lambda name, module, inputs: held.__setitem__(name, inputs)):
        yield held


@contextlib.contextmanager
def _reading(layers: Mapping[str, nn.Module], read: Any) -> Iterator[None]:
    """Inside, `read(input name, module, inputs)` is called whenever a layer is; once where several share an input."""
    first_reader = {input_of(name): module for name, module in reversed(list(layers.items()))}
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: read(name, module, args[0].detach()))
        for name, module in first_reader.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer's weight, laid flat, is multiplied with: of a linear layer its inputs, (..., in), as they are.

    A convolution sees a row at each place of its kernel, (batch, places, in · height · width), as `unfold` has it.
    Raises BaseModelError for one whose channels are in groups, each of which has a weight of its own.
    """
    if not isinstance(module, nn.Conv2d):
        return inputs
    if module.groups != 1:
        raise BaseModelError(f"a convolution in {module.groups} groups cannot be fused; leave this layer as it is")
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # torch's own account of the padding, which may also be given as "same" or "valid".
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    unfolded = functional.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return unfolded.transpose(1, 2)


def _flat(inputs: Tensor) -> Tensor:
    return (inputs.movedim(1, -1) if inputs.ndim == 4 else inputs).flatten(0, -2)


def _double(name: str, rows: Tensor) -> Tensor:
    """Rows in double precision. Raises BadInputError as soon as a sum would be spoilt."""
    rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # Apple's GPUs have no double precision
    if not torch.isfinite(rows.sum()):  # the sum of what is not finite is not
        raise BadInputError(f"in its own model, {name} has values that are not finite; leave it out")
    return rows


def _count(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    if name in sums:
        sums[name].addmm_(left.T, right)
    else:
        sums[name] = left.T @ right


def parts(layers: Iterable[str], widths: Mapping[str, int], budget: float | None) -> list[list[str]]:
    """Layers in groups whose moments fit into `budget` bytes (one layer at least), each layer once and in order."""
    groups: list[list[str]] = []
    inputs: set[str] = set()
    used = 0.0
    for name in layers:
        size = 0 if input_of(name) in inputs else 8 * widths[name] ** 2
        if not groups or (budget is not None and used + size > budget):
            groups.append([])
            inputs, used, size = set(), 0.0, 8 * widths[name] ** 2
        groups[-1].append(name)
        inputs.add(input_of(name))
        used += size
    return groups
