"""The least-squares problem of one layer: which change of its weight serves all concepts best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    @classmethod
    def of(cls, change: Change | None, seen: Seen, base: Tensor) -> LayerSums:
        """One concept's, from its change of this layer (None: it did not change it) and the inputs that it saw.

        Where they drifted, what is to be met is (W0 + ΔW_i) X_i on the inputs X̃_i, W0 being the `base` weight.
        """
        if seen.drifted is None or seen.cross is None:
            moments = seen.moments
            pull, energy = (
                (torch.zeros_like(base, dtype=torch.float64), 0.0) if change is None else _pull(change, moments)
            )
        else:
            moments, base = seen.drifted, base.double()
            own = base if change is None else base + change.matrix(dtype=base.dtype).to(base)
            reached, aimed = base @ moments, own @ seen.cross
            pull = aimed - reached
            energy = _inner(own @ seen.moments, own) - 2 * _inner(aimed, base) + _inner(reached, base)
        return cls(moments, pull, max(energy, 0.0), seen.rows)

    def add(self, other: LayerSums, weight: float) -> None:
        """Count in another's, `weight` times."""
        self.moments.add_(other.moments, alpha=weight)
        self.pulls.add_(other.pulls, alpha=weight)
        self.energy += weight * other.energy
        self.rows += other.rows

    def objective(self, change: Tensor, gram: Tensor | None = None) -> float:
        """Σ w_i ‖(ΔW_i − change) X_iᵀ‖²_F for a change of the weight (out, in), from the sums alone.

        `gram`, changeᵀ change (in, in), is made here unless it is known: one serves all sums of a layer.
        """
        change = change.double()
        gram = change.T @ change if gram is None else gram
        return max(self.energy - 2 * _inner(self.pulls, change) + _inner(gram, self.moments), 0.0)


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
        for own, weight in zip(self._each(), self.weights, strict=True):
            sums.add(own, weight)
        if self.prior is not None:
            sums.add(LayerSums.of(None, self.prior, self.base), self.prior_weight)
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

    def residuals(self, change: Tensor) -> list[tuple[float, float]]:
        """For a change (out, in), each concept's ‖(ΔW_i − change) X_i‖² and ‖ΔW_i X_i‖²: what is left of what it wants, and all of it."""
        gram = change.double().T @ change.double()
        return [(own.objective(change, gram), own.energy) for own in self._each()]

    def energies(self) -> list[float]:
        """‖ΔW_i X_i‖² of each concept."""
        return [own.energy for own in self._each()]

    def _each(self) -> Iterator[LayerSums]:
        """Each concept's own sums."""
        return (LayerSums.of(change, self.look(number), self.base) for number, change in enumerate(self.changes))


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
