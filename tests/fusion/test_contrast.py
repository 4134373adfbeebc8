"""Contrastive fusion against its objective, written out on the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixofshow.concepts.changes import Full, LowRank
from mixofshow.fusion.contrast import MOST, Contrast
from mixofshow.fusion.methods import contrastive, gradient, mean
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.statistics import LayerStatistics
from tests.fusion.test_problem import normal

OUT, IN, ROWS = 5, 8, 30
WEIGHTS = [0.5, 1.0, 1.5]


INPUTS = [normal(ROWS, IN, seed=seed) + normal(IN, seed=seed + 10) for seed in (1, 2, 3)]
CHANGES = [
    LowRank(normal(2, IN, seed=4), normal(OUT, 2, seed=5)),
    Full(normal(OUT, IN, seed=6)),
    LowRank(normal(1, IN, seed=7), normal(OUT, 1, seed=8)),
]


@pytest.fixture(params=[0.0, 0.7], ids=["", "prior"])
def problem(request) -> LayerProblem:
    seen = [LayerStatistics(one.T @ one, ROWS) for one in INPUTS]
    return LayerProblem(torch.zeros(OUT, IN), CHANGES, seen.__getitem__, WEIGHTS, seen[0], request.param)


def objective(change: Tensor, margin: float, prior_weight: float) -> Tensor:
    """Of rows, without damping."""
    total = prior_weight * (INPUTS[0] @ change.T).square().sum()
    for number, (rows, weight) in enumerate(zip(INPUTS, WEIGHTS, strict=True)):
        own = CHANGES[number].matrix()
        total = total + weight * (rows @ (change - own).T).square().sum()
        for other, one in enumerate(CHANGES):
            if other != number:
                wanted = margin * (rows @ (own - one.matrix()).T).norm()
                near = (wanted - (rows @ (change - one.matrix()).T).norm()).clamp(min=0)
                total = total + weight * near.square() / 2
    return total


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0, 1.2])
def test_loss_and_slope_from_moments_are_those_of_the_rows(problem, margin, monkeypatch):
    monkeypatch.setattr("mixofshow.fusion.contrast.MOST", 100.0)  # so that the slope is whole
    contrast = Contrast(problem, margin)
    change = (gradient(problem) + 0.1 * normal(OUT, IN, seed=9)).requires_grad_()
    expected = objective(change, margin, problem.prior_weight)
    expected.backward()
    loss, shares = contrast.of(change.detach())
    assert loss == pytest.approx(float(expected.detach()))
    assert shares.any() if margin >= 1 else margin or not shares.any()
    sums = contrast.sums(shares)
    torch.testing.assert_close(2 * (change.detach() @ sums.moments - sums.rhs), change.grad)


def test_it_has_less_of_the_objective_than_gradient_fusion_and_more_rounds_have_no_more(problem):
    def damped(change: Tensor) -> float:
        damping = 0.03 * float(problem.sums.moments.diagonal().mean())
        loss = objective(change, 1.0, problem.prior_weight)
        return float(loss + damping * (change - mean(problem)).square().sum())

    found = [damped(contrastive(problem, rounds=rounds)) for rounds in (1, 3, 20)]
    assert damped(gradient(problem)) > found[0] >= found[1] >= found[2]


def test_it_is_farther_from_the_others_than_gradient_fusion_is(problem):
    def nearest(change: Tensor) -> float:
        """The least distance to another concept, over that of the concept itself."""
        return min(
            float((rows @ (change - other.matrix()).T).norm() / (rows @ (CHANGES[k].matrix() - other.matrix()).T).norm())
            for k, rows in enumerate(INPUTS)
            for other in (one for j, one in enumerate(CHANGES) if j != k)
        )

    assert nearest(contrastive(problem)) > nearest(gradient(problem)) + 0.01


def test_without_a_margin_it_is_gradient_fusion(problem):
    assert torch.equal(contrastive(problem, margin=0), gradient(problem))
    assert torch.equal(contrastive(problem, margin=0, ridge=0.2), gradient(problem, ridge=0.2))


def test_nobody_counts_more_than_the_concept_itself(problem):
    """However near: at the others' own answer, where the slope away from them has no bound."""
    _, shares = Contrast(problem, 2.0).of(CHANGES[1].matrix() + 1e-9)
    assert shares.sum(1).max() == pytest.approx(MOST)
    assert torch.linalg.eigvalsh(Contrast(problem, 2.0).sums(shares).moments).min() > 0
