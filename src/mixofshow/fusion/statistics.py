"""What fusion needs to know of a layer's inputs: second moments, summed in a stream.

For the rows x of a layer's input X_i (rows, in) only C_i = X_iᵀ X_i (in, in) is kept, in double precision, so memory
grows neither with steps nor resolution nor the number of concepts. Layers that read the same input (query, key and
value of one self-attention) share one C.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from mixofshow.concepts.concept import Change, LowRank

_SHARED_INPUT: Final = re.compile(r"(attn1\.to_[qkv]|attn2\.to_[kv]|self_attn\.[qkv]_proj)$")


def input_of(layer: str) -> str:
    """The name of a layer's input; layers that read the same tensor have one name."""
    return _SHARED_INPUT.sub(lambda match: match.group().rsplit(".", 1)[0] + ".input", layer)


class Moments:
    """Second moments of the inputs of some layers, by input name."""

    def __init__(self) -> None:
        self.matrices: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    @torch.no_grad()
    def add(self, name: str, inputs: Tensor) -> None:
        """Count in some rows, (..., in) or, from a 1×1 convolution, (batch, in, height, width)."""
        rows = (inputs.movedim(1, -1) if inputs.ndim == 4 else inputs).flatten(0, -2).double()
        product = rows.T @ rows
        known = self.matrices.get(name)
        self.matrices[name] = product if known is None else known.add_(product)
        self.rows[name] = self.rows.get(name, 0) + len(rows)

    @contextlib.contextmanager
    def recording(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, every call of these layers is counted in; an input that several share is counted once."""
        first_reader = {input_of(name): module for name, module in reversed(list(layers.items()))}

        def hook_for(name: str) -> Any:
            return lambda module, args: self.add(name, args[0])

        handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in first_reader.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class LayerSums:
    """Sums over concepts for one layer: all that solving and measuring need.

    moments Σ C_i, (in, in); pulls Σ ΔW_i C_i, (out, in); diagonal_pulls Σ ΔW_i diag(C_i), (out, in);
    energy Σ tr(ΔW_i C_i ΔW_iᵀ); rows Σ rows of X_i.
    """

    moments: Tensor
    pulls: Tensor
    diagonal_pulls: Tensor
    energy: float = 0.0
    rows: int = 0

    @classmethod
    def zero(cls, weight: Tensor) -> LayerSums:
        """Sums over no concept, for a layer of this weight, (out, in)."""
        outputs, inputs = weight.shape
        return cls(
            weight.new_zeros(inputs, inputs, dtype=torch.float64),
            weight.new_zeros(outputs, inputs, dtype=torch.float64),
            weight.new_zeros(outputs, inputs, dtype=torch.float64),
        )

    @torch.no_grad()
    def add(self, delta: Change | None, moments: Tensor, rows: int) -> None:
        """Count in one concept's change of this layer (None: it did not change it) and the inputs it saw."""
        self.moments += moments
        self.rows += rows
        if delta is None:
            return
        if isinstance(delta, LowRank):
            down, up = delta.down.to(moments), delta.up.to(moments)
            seen = down @ moments
            self.pulls += up @ seen
            self.diagonal_pulls += up @ (down * moments.diagonal())
            self.energy += float(((up.T @ up) * (seen @ down.T)).sum())
        else:
            change = delta.matrix(dtype=moments.dtype).to(moments)
            pull = change @ moments
            self.pulls += pull
            self.diagonal_pulls += change * moments.diagonal()
            self.energy += float((pull * change).sum())

    def objective(self, change: Tensor) -> float:
        """Σ_i ‖(ΔW_i − change) X_iᵀ‖²_F for a change of the weight (out, in): the fusion objective, from the sums alone."""
        change = change.double()
        value = self.energy - 2 * float((self.pulls * change).sum()) + float(((change @ self.moments) * change).sum())
        return max(value, 0.0)
