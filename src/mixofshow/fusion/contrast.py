"""How near a fused layer comes to other concepts than the one whose inputs it sees, from second moments alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from mixofshow.concepts.changes import inner
from mixofshow.fusion.problem import LayerProblem, LayerSums

MOST: Final = 0.5
"""That all others together may count against a concept, so that there always is a least objective."""


@dataclass(frozen=True)
class Contrast:
    """A layer's problem, where on concept i's inputs X_i no fused ΔW is to be near another concept's ΔW_j.

    Near is less than `margin` times as far as ΔW_i is: h_ij = max(0, margin · ‖(ΔW_i − ΔW_j) X_i‖ − ‖(ΔW − ΔW_j) X_i‖).
    """

    problem: LayerProblem
    margin: float

    @cached_property
    def _changes(self) -> list[Tensor]:
        return self.problem.matrices()

    @cached_property
    def _products(self) -> Tensor:
        """⟨ΔW_j C_i, ΔW_k⟩, (i, j, k)."""
        rows = []
        for moments in self._moments():
            products = [change and change.times(moments) for change in self.problem.changes]
            rows.append([[one.inner(other) if one else 0.0 for other in self._changes] for one in products])
        return torch.tensor(rows, dtype=torch.float64)

    def _moments(self) -> Iterator[Tensor]:
        return (self.problem.statistics(number).moments for number in range(len(self.problem.changes)))

    def of(self, change: Tensor) -> tuple[float, Tensor]:
        """Of a ΔW (out, in): Σ w_i (‖(ΔW − ΔW_i) X_i‖² + Σ_j h_ij² / (n − 1)), and a_ij, (concepts, concepts).

        a_ij = h_ij / ((n − 1) ‖(ΔW − ΔW_j) X_i‖) says how much the slope has of the step away from j; all of i's together at
        most MOST.
        """
        others = max(len(self._changes) - 1, 1)
        loss, shares = 0.0, []
        for number, (moments, weight) in enumerate(zip(self._moments(), self.problem.weights, strict=True)):
            seen, products = change @ moments, self._products[number]
            across = torch.tensor([inner(seen, one) for one in self._changes], dtype=torch.float64)
            energies = products.diagonal()
            squares = (inner(seen, change) - 2 * across + energies).clamp(min=0)
            apart = (products[number, number] - 2 * products[number] + energies).clamp(min=0).sqrt()
            distances = squares.sqrt()
            near = (self.margin * apart - distances).clamp(min=0)
            near[number] = 0
            loss += weight * float(squares[number] + near.square().sum() / others)
            share = torch.where(distances > 0, near / distances, 0) / others
            shares.append(share * (MOST / share.sum().clamp(min=MOST)))
        if self.problem.prior is not None:
            loss += self.problem.prior_weight * inner(change.T @ change, self.problem.prior.moments)
        return loss, torch.stack(shares)

    def sums(self, shares: Tensor) -> LayerSums:
        """Σ w_i (1 − Σ_j a_ij) C_i and Σ w_i (ΔW_i − Σ_j a_ij ΔW_j) C_i, for the a_ij; the prior counts as it does."""
        found = LayerSums(torch.zeros_like(self.problem.sums.moments), self.problem.zero())
        for number, (moments, weight) in enumerate(zip(self._moments(), self.problem.weights, strict=True)):
            factors = -shares[number]
            factors[number] = 1.0
            found.moments.add_(moments, alpha=weight * float(factors.sum()))
            for change, factor in zip(self.problem.changes, factors.tolist(), strict=True):
                if change is not None:
                    change.times(moments).add_to(found.rhs, weight * factor)
        if self.problem.prior is not None:
            found.moments.add_(self.problem.prior.moments, alpha=self.problem.prior_weight)
        return found
