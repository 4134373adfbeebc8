"""The least-squares problem of one layer: which change of its weight serves all concepts best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mixofshow.concepts.concept import Change, LowRank
from mixofshow.fusion.statistics import Seen


@dataclass
class LayerSums:
    """Sums over concepts: all that solving and measuring need.

    moments Σ w_i C_i, (in, in); pulls Σ w_i ΔW_i C_i, (out, in); energy Σ w_i tr(ΔW_i C_i ΔW_iᵀ); rows of all inputs.
    """

    moments: Tensor
    pulls: Tensor
    energy: float = 0.0
    rows: int = 0

    @classmethod
    def zero(cls, base: Tensor) -> LayerSums:
        """Sums over no concept, for a layer of this weight, (out, in)."""
        outputs, inputs = base.shape
        return cls(
            base.new_zeros(inputs, inputs, dtype=torch.float64), base.new_zeros(outputs, inputs, dtype=torch.float64)
        )

    def add(self, change: Change | None, seen: Seen, weight: float, base: Tensor) -> None:
        """Count in one concept's change of this layer (None: it did not change it) and the inputs it saw.

        Where they drifted, what is to be met is (W0 + ΔW_i) X_i on the inputs X̃_i, W0 being the `base` weight.
        """
        self.rows += seen.rows
        if seen.drifted is None or seen.cross is None:
            moments = seen.moments
            pull, energy = (torch.zeros_like(self.pulls), 0.0) if change is None else _pull(change, moments)
        else:
            moments, base = seen.drifted, base.double()
            own = base if change is None else base + change.matrix(dtype=base.dtype).to(base)
            reached, aimed = base @ moments, own @ seen.cross
            pull = aimed - reached
            energy = _inner(own @ seen.moments, own) - 2 * _inner(aimed, base) + _inner(reached, base)
        self.moments.add_(moments, alpha=weight)
        self.pulls.add_(pull, alpha=weight)
        self.energy += weight * max(energy, 0.0)

    def objective(self, change: Tensor) -> float:
        """Σ w_i ‖(ΔW_i − change) X_iᵀ‖²_F for a change of the weight (out, in), from the sums alone."""
        change = change.double()
        value = self.energy - 2 * _inner(self.pulls, change) + _inner(change @ self.moments, change)
        return max(value, 0.0)


@dataclass(frozen=True)
class LayerProblem:
    """One layer's part of a fusion: its base weight (out, in), the concepts' changes of it, and what it saw of each.

    A concept that leaves the layer alone has the change None. `look(i)` gives what was seen of concept i; it may read
    a file, so that no more than one concept's moments are in memory. `prior` is what the base model's own prompts
    show the layer, which nothing should change there; it counts `prior_weight` times as much as a concept.
    """

    base: Tensor
    changes: Sequence[Change | None]
    look: Callable[[int], Seen]
    weights: Sequence[float]
    prior: Seen | None = None
    prior_weight: float = 0.0

    @cached_property
    def sums(self) -> LayerSums:
        """Over all concepts in their order, then the prior."""
        sums = LayerSums.zero(self.base)
        for number, (change, weight) in enumerate(zip(self.changes, self.weights, strict=True)):
            sums.add(change, self.look(number), weight, self.base)
        if self.prior is not None:
            sums.add(None, self.prior, self.prior_weight, self.base)
        return sums

    def weighed(self, weights: Sequence[float]) -> LayerProblem:
        """The same problem with other weights."""
        return replace(self, weights=weights)

    def without(self, *numbers: int) -> LayerProblem:
        """The same problem without some concepts, summed anew: nothing is subtracted."""
        kept = [k for k in range(len(self.changes)) if k not in numbers]
        return replace(
            self,
            changes=[self.changes[k] for k in kept],
            weights=[self.weights[k] for k in kept],
            look=lambda k: self.look(kept[k]),
        )

    def zero(self) -> Tensor:
        """No change, (out, in), in double."""
        return torch.zeros_like(self.base, dtype=torch.float64)

    def matrices(self) -> list[Tensor]:
        """The changes as matrices, each (out, in), in double; None is no change: 0."""
        zero = self.zero()
        return [zero if one is None else one.matrix(dtype=zero.dtype).to(zero) for one in self.changes]

    def residual(self, number: int, change: Tensor) -> tuple[float, float]:
        """‖(ΔW_i − change) X_i‖² and ‖ΔW_i X_i‖² of one concept: what is left of what it wants, and all of it."""
        own = LayerSums.zero(self.base)
        own.add(self.changes[number], self.look(number), 1.0, self.base)
        return own.objective(change), own.energy


def _pull(change: Change, moments: Tensor) -> tuple[Tensor, float]:
    """ΔW C and tr(ΔW C ΔWᵀ), through the factors where there are some."""
    if isinstance(change, LowRank):
        down, up = change.down.to(moments), change.up.to(moments)
        seen = down @ moments
        return up @ seen, _inner(up.T @ up, seen @ down.T)
    full = change.matrix(dtype=moments.dtype).to(moments)
    pull = full @ moments
    return pull, _inner(pull, full)


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum())
