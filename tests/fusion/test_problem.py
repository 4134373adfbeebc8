"""One layer's least squares against all rows at hand, in double precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mixofshow.concepts.changes import Change, Full, LowRank
from mixofshow.fusion.methods import KEEPS_INPUTS, METHODS, gradient
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.statistics import LayerStatistics

OUT, IN = 6, 10
WEIGHTS = (1.0, 0.25, 1.75)
ROWS = {"more rows than dimensions": 30, "fewer rows than dimensions": 2}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = normal(OUT, IN, seed=0)
CHANGES: list[Change | None] = [
    LowRank(normal(2, IN, seed=1), normal(OUT, 2, seed=2)),
    Full(normal(OUT, IN, seed=3)),
    None,
]


@dataclasses.dataclass(frozen=True)
class Truth:
    """Three concepts' rows X_i, each (rows, in)."""

    inputs: list[Tensor]

    @property
    def targets(self) -> list[Tensor]:
        """(W0 + ΔW_i) X_i, (rows, out)."""
        return [rows @ own_weight(change).T for rows, change in zip(self.inputs, CHANGES, strict=True)]

    def problem(self) -> LayerProblem:
        seen = [LayerStatistics(rows.T @ rows, len(rows)) for rows in self.inputs]
        return LayerProblem(BASE, CHANGES, seen.__getitem__, WEIGHTS)

    def left(self, number: int, weight: Tensor) -> float:
        """‖(W0 + ΔW_i) X_i − W X_i‖²"""
        return float((self.targets[number] - self.inputs[number] @ weight.T).square().sum())


def own_weight(change: Change | None) -> Tensor:
    return BASE if change is None else BASE + change.matrix()


@pytest.fixture(params=ROWS.values(), ids=ROWS)
def rows(request) -> int:
    return request.param


@pytest.fixture
def truth(rows) -> Truth:
    return Truth([normal(rows, IN, seed=10 + number) for number in range(3)])


def test_the_least_damped_fusion_toward_the_base_is_least_squares(truth):
    reached = torch.cat([w**0.5 * one for w, one in zip(WEIGHTS, truth.inputs, strict=True)])
    targets = torch.cat([w**0.5 * one for w, one in zip(WEIGHTS, truth.targets, strict=True)])
    # The pseudo-inverse gives the solution nearest to W0.
    expected = (torch.linalg.pinv(reached) @ (targets - reached @ BASE.T)).T
    found = gradient(truth.problem(), ridge=1e-8, toward="base")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_damped_fusion_is_least_squares_with_the_average_as_further_rows(ridge, truth):
    reached = torch.cat([w**0.5 * one for w, one in zip(WEIGHTS, truth.inputs, strict=True)])
    targets = torch.cat([w**0.5 * one for w, one in zip(WEIGHTS, truth.targets, strict=True)])
    mean = sum(own_weight(change) for change in CHANGES) / len(CHANGES)
    root = (ridge * float(reached.square().sum()) / IN) ** 0.5
    stacked = torch.cat([reached, root * torch.eye(IN, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([targets, root * mean.T]), driver="gelsd").solution.T
    torch.testing.assert_close(BASE + gradient(truth.problem(), ridge=ridge), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("change", [torch.zeros(OUT, IN).double(), normal(OUT, IN, seed=9), CHANGES[0].matrix()])
def test_the_objective_is_that_of_all_rows(change, truth):
    problem = truth.problem()
    expected = [truth.left(number, BASE + change) for number in range(3)]
    total = sum(w * one for w, one in zip(WEIGHTS, expected, strict=True))
    assert problem.sums.objective(change) == pytest.approx(total, rel=1e-9)
    wanted = [truth.left(number, BASE) for number in range(3)]
    for found, truly in zip(problem.residuals(change), zip(expected, wanted, strict=True), strict=True):
        assert found == pytest.approx(truly, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 2), (1, 0)])
def test_without_some_concepts_is_the_problem_of_the_others(gone, truth):
    kept = [number for number in range(3) if number not in gone]
    problem = truth.problem()
    expected = LayerProblem(
        BASE,
        [CHANGES[number] for number in kept],
        lambda number: problem.statistics(kept[number]),
        [WEIGHTS[number] for number in kept],
    )
    found = problem.without(*gone)
    assert torch.equal(found.sums.moments, expected.sums.moments)
    assert torch.equal(found.sums.rhs, expected.sums.rhs)
    assert found.sums.energy == expected.sums.energy


@pytest.mark.parametrize("method", sorted(METHODS.keys() - KEEPS_INPUTS - {"orthogonal"}))
def test_only_the_proportion_of_weights_counts(method, truth):
    """As where one concept is left out, and the weights of the others do not sum to their number."""
    problem = truth.problem()
    tripled = dataclasses.replace(problem, weights=[3 * weight for weight in WEIGHTS])
    torch.testing.assert_close(METHODS[method](tripled), METHODS[method](problem))


def test_the_prior_is_one_more_concept_that_wants_no_change(truth):
    problem = truth.problem()
    with_prior = dataclasses.replace(problem, prior=problem.statistics(0), prior_weight=0.3)
    asked = dataclasses.replace(
        problem,
        changes=[*CHANGES, None],
        statistics=lambda number: problem.statistics(number % 3),
        weights=[*WEIGHTS, 0.3],
    )
    assert torch.equal(with_prior.sums.moments, asked.sums.moments)
    assert torch.equal(with_prior.sums.rhs, asked.sums.rhs)
    assert with_prior.sums.energy == asked.sums.energy
