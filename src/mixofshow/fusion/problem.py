"""The least-squares problem of one layer: which change of its weight serves all concepts best."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from mixofshow.concepts.changes import Change, LowRank, inner
from mixofshow.fusion.statistics import LayerStatistics


@dataclass(frozen=True)
class LeastSquaresTerm:
    """One concept's squared error in a layer, of a change ΔW: energy − 2 ⟨rhs, ΔW⟩ + ⟨ΔWᵀΔW, moments⟩.

    moments (in, in) are C_i; rhs is ΔW_i C_i, None where the concept leaves the layer alone; energy is its square.
    """

    moments: Tensor
    rows: int
    energy: float
    rhs: Change | None


@dataclass
class LayerSums:
    """Sums over concepts: all that solving and measuring need.

    moments Σ w_i C_i, (in, in); rhs Σ w_i ΔW_i C_i, (out, in); energy Σ w_i tr(ΔW_i C_i ΔW_iᵀ); rows of all inputs.
    """

    moments: Tensor
    rhs: Tensor
    energy: float = 0.0
    rows: int = 0

    def objective(self, change: Tensor) -> float:
        """Σ w_i ‖(ΔW_i − change) X_iᵀ‖²_F for a change of the weight (out, in), from the sums alone."""
        change = change.double()
        return max(self.energy - 2 * inner(self.rhs, change) + inner(change.T @ change, self.moments), 0.0)


@dataclass(frozen=True)
class LayerProblem:
    """One layer's part of a fusion: its base weight (out, in), the concepts' changes of it, and what it saw of each.

    A concept that leaves the layer alone has the change None. `statistics(i)` gives what was seen of concept i; it may read
    a file, so that no more than one concept's moments are in memory. `prior` is what the base model's own prompts
    show the layer, which nothing should change there; it counts `prior_weight` times as much as a concept.
    """

    base: Tensor
    changes: Sequence[Change | None]
    statistics: Callable[[int], LayerStatistics]
    weights: Sequence[float]
    prior: LayerStatistics | None = None
    prior_weight: float = 0.0

    @cached_property
    def sums(self) -> LayerSums:
        """Over all concepts in their order, then the prior."""
        outputs, inputs = self.base.shape
        zeros = partial(self.base.new_zeros, dtype=torch.float64)
        sums = LayerSums(zeros(inputs, inputs), zeros(outputs, inputs))
        terms = zip(self.weights, self._terms(), strict=True)
        of_prior = [] if self.prior is None else [(self.prior_weight, self._term(None, self.prior))]
        for weight, term in itertools.chain(terms, of_prior):
            sums.moments.add_(term.moments, alpha=weight)
            sums.energy += weight * term.energy
            sums.rows += term.rows
            if term.rhs is not None:
                term.rhs.add_to(sums.rhs, weight)
        return sums

    def without(self, *numbers: int) -> LayerProblem:
        """The same problem without some concepts, summed anew: nothing is subtracted."""
        kept = [k for k in range(len(self.changes)) if k not in numbers]
        return replace(
            self,
            changes=[self.changes[k] for k in kept],
            weights=[self.weights[k] for k in kept],
            statistics=lambda k: self.statistics(kept[k]),
        )

    def zero(self) -> Tensor:
        """No change, (out, in), in double."""
        return torch.zeros_like(self.base, dtype=torch.float64)

    def matrices(self) -> list[Tensor]:
        """The changes as matrices, each (out, in), in double; None is no change: 0."""
        zero = self.zero()
        return [zero if one is None else one.matrix(dtype=zero.dtype).to(zero) for one in self.changes]

    def residual_of_others(self, number: int, change: Tensor) -> float:
        """The residual of all concepts but one: Σ w_k ‖(ΔW_k − change) X_k‖²."""
        left = self.residuals(change)
        return sum(weight * left[k][0] for k, weight in enumerate(self.weights) if k != number)

    def residuals(self, change: Tensor) -> list[tuple[float, float]]:
        """‖(ΔW_i − change) X_i‖² and ‖ΔW_i X_i‖² of each concept: its residual, and its target."""
        change = change.double()
        gram = change.T @ change
        found = []
        for term in self._terms():
            aligned = 0.0 if term.rhs is None else term.rhs.inner(change)
            found.append((max(term.energy - 2 * aligned + inner(gram, term.moments), 0.0), term.energy))
        return found

    def energies_and_outputs(self) -> list[tuple[float, float]]:
        """‖ΔW_i X_i‖² and ‖W0 X_i‖² of each concept: its target, and the base's output on the same inputs."""
        base = self.base.double()
        gram = base.T @ base
        return [(term.energy, max(inner(gram, term.moments), 0.0)) for term in self._terms()]

    def _terms(self) -> Iterator[LeastSquaresTerm]:
        return (self._term(change, self.statistics(number)) for number, change in enumerate(self.changes))

    def _term(self, change: Change | None, seen: LayerStatistics) -> LeastSquaresTerm:
        rhs = change and change.times(seen.moments)
        energy = _inner(rhs, change) if rhs and change else 0.0
        return LeastSquaresTerm(seen.moments, seen.rows, max(energy, 0.0), rhs)


def _inner(one: Change, other: Change) -> float:
    """⟨A, B⟩ for two changes (out, in), A being in double; through the factors where both have some."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return inner(one.up.T @ other.up.to(one.up), one.down @ other.down.to(one.down).T)
    full = one.matrix()
    return inner(full, other.matrix().to(full))
