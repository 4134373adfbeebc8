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

from mixofshow.bases.layers import where_double
from mixofshow.errors import BadInputError, BaseModelError

_SHARED_INPUT: Final = re.compile(r"(attn1\.to_[qkv]|attn2\.to_[kv]|self_attn\.[qkv]_proj)$")
TENSORS: Final = ("moments", "inputs")
CHUNK: Final = 8192
"""Rows that are multiplied at a time."""
SQUARED: Final = 1e15
"""From here on squares, summed, may be too large for single precision."""
BLOCK: Final = 256
"""Columns from which on half of the products are left out, as the other half is the same."""


def input_of(layer: str) -> str:
    """The name of a layer's input; layers that read the same tensor have one name."""
    return _SHARED_INPUT.sub(lambda match: match.group().rsplit(".", 1)[0] + ".input", layer)


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer saw of one concept.

    moments C = XᵀX, (in, in), of `rows` rows; `inputs` is X itself, (rows, in), kept only for methods that cannot do
    without.
    """

    moments: Tensor
    rows: int
    inputs: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: value for name in TENSORS if (value := getattr(self, name)) is not None}

    def to(self, device: Any) -> LayerStatistics:
        """The same on a device."""
        return LayerStatistics(**{name: value.to(device) for name, value in self.tensors().items()}, rows=self.rows)


class MomentAccumulator:
    """Second moments of the inputs of some layers, by input name, while they are counted.

    Sums are in double precision, and products too if they are to be `exact`; else products are in single at least,
    which is two to sixty times as fast and good enough where a ridge damps what it loses.
    """

    def __init__(self, *, keep_inputs: bool = False, exact: bool = True) -> None:
        self.keep_inputs = keep_inputs
        self.exact = exact or not _single_is_single()
        self._moments: dict[str, Tensor] = {}
        self._inputs: dict[str, list[Tensor]] = {}
        self._rows: dict[str, int] = {}

    def add(self, name: str, inputs: Tensor) -> None:
        """Count in some rows, (..., in) or, from a 1×1 convolution, (batch, in, height, width)."""
        rows = (inputs.movedim(1, -1) if inputs.ndim == 4 else inputs).flatten(0, -2)
        for chunk in rows.split(CHUNK):
            _count(self._moments, name, _multiplied(name, chunk, exact=self.exact))
        if self.keep_inputs:
            # On the CPU: of all layers they are more than an accelerator holds.
            self._inputs.setdefault(name, []).append(rows.to("cpu", copy=True))
        self._rows[name] = self._rows.get(name, 0) + len(rows)

    def seen(self) -> dict[str, LayerStatistics]:
        """What was counted, by input name."""
        return {
            name: LayerStatistics(
                _whole(half), self._rows[name], inputs=torch.cat(self._inputs[name]) if self.keep_inputs else None
            )
            for name, half in self._moments.items()
        }

    @contextlib.contextmanager
    def recording(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, every call of these layers is counted in; once where several share an input."""
        first_reader = {input_of(name): module for name, module in reversed(list(layers.items()))}
        handles = [
            module.register_forward_pre_hook(
                lambda module, args, name=name: self.add(name, rows_of(module, args[0].detach()))
            )
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


def _single_is_single() -> bool:
    """Whether torch was not allowed to round single precision further, by its older way to say so or its newer one."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the newer one was used
        return False


def _multiplied(name: str, rows: Tensor, *, exact: bool) -> Tensor:
    """Rows in the precision that they are multiplied in. Raises BadInputError as soon as a sum would be spoilt."""
    rows = where_double(rows)
    rows = rows.to(torch.float64 if exact else torch.promote_types(rows.dtype, torch.float32))
    largest = rows.abs().max()
    if not torch.isfinite(largest):
        raise BadInputError(f"in its own model, {name} has values that are not finite; leave it out")
    return rows if largest < SQUARED else rows.double()


def _count(halves: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """Add XᵀX to the upper half of a sum; the other half is the same, and so are most products below the diagonal."""
    width = rows.shape[1]
    if name not in halves:
        halves[name] = rows.new_zeros(width, width, dtype=torch.float64)
    with torch.autocast(rows.device.type, enabled=False):
        for block in _blocks(width):
            halves[name][block, block.start :] += rows[:, block].T @ rows[:, block.start :]


def _whole(half: Tensor) -> Tensor:
    """The upper half, mirrored in place."""
    for block in _blocks(len(half)):
        half[block.stop :, block] = half[block, block.stop :].T
    return half


def _blocks(width: int) -> list[slice]:
    """Columns, in quarters where they are many."""
    step = max(BLOCK, -(-width // 4))
    return [slice(start, start + step) for start in range(0, width, step)]


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
