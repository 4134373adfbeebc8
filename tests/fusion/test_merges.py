"""The fusion methods for comparison against closed forms, on matrices small enough to check by hand."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from mixofshow.concepts.changes import Change, Full, LowRank
from mixofshow.errors import SettingsError
from mixofshow.fusion.methods import (
    METHODS,
    average,
    custom_diffusion,
    dare,
    gradient,
    lbfgs,
    orthogonal,
    regmean,
    svd,
    ties,
    total,
)
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.solving import check_method
from mixofshow.fusion.statistics import LayerStatistics
from tests.fusion.test_problem import normal

OUT, IN = 6, 10


def problem_of(changes: list[Change | None], moments: list[Tensor], shape: tuple[int, int] = (OUT, IN)) -> LayerProblem:
    # Rows that have these moments: LᵀL for the upper triangle L.
    seen = [LayerStatistics(one, IN, inputs=torch.linalg.cholesky(one, upper=True)) for one in moments]
    return LayerProblem(torch.zeros(shape), changes, seen.__getitem__, [1.0] * len(changes))


def by_hand(*tables: list[list[float]]) -> LayerProblem:
    """2×2 changes with inputs that do not matter."""
    changes: list[Change | None] = [Full(torch.tensor(table, dtype=torch.float64)) for table in tables]
    return problem_of(changes, [torch.eye(2, dtype=torch.float64)] * len(changes), (2, 2))


@pytest.fixture(scope="module")
def changes() -> list[Change | None]:
    """Two of rank 2, one full, one concept that does not change this layer."""
    low = [LowRank(normal(2, IN, seed=seed), normal(OUT, 2, seed=seed + 10)) for seed in (1, 2)]
    return [*low, Full(normal(OUT, IN, seed=3)), None]


@pytest.fixture(scope="module")
def moments() -> list[Tensor]:
    rows = [normal(30, IN, seed=seed) * (1 + seed % 3) for seed in (21, 22, 23, 24)]
    return [one.T @ one for one in rows]


@pytest.fixture(scope="module")
def problem(changes, moments) -> LayerProblem:
    return problem_of(changes, moments)


@pytest.fixture(scope="module")
def dense(changes) -> Tensor:
    """(concepts, out, in)"""
    return torch.stack([torch.zeros(OUT, IN).double() if one is None else one.matrix() for one in changes])


def test_sum_and_average(problem, dense):
    torch.testing.assert_close(total(problem), dense.sum(0))
    torch.testing.assert_close(average(problem), dense.mean(0))
    weights = [2.0, *[0.5] * (len(dense) - 1)]  # whose mean is not 1
    mean = sum(w * one for w, one in zip(weights, dense, strict=True)) / sum(weights)
    torch.testing.assert_close(METHODS["average"](dataclasses.replace(problem, weights=weights)), mean)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_svd_is_the_nearest_of_its_rank(rank, problem, dense):
    found = svd(problem, rank=rank)
    assert torch.linalg.matrix_rank(found) == rank
    values = torch.linalg.svdvals(dense.mean(0))
    # Eckart–Young: no matrix of this rank is nearer than what the other singular values hold.
    assert float((dense.mean(0) - found).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-9)


@pytest.mark.parametrize("rank", [OUT, 100])
def test_svd_of_full_rank_cuts_nothing(rank, problem, dense):
    torch.testing.assert_close(svd(problem, rank=rank), dense.mean(0))


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_regmean_without_shrinking_is_gradient_fusion_toward_the_base(ridge, problem):
    expected = gradient(problem, ridge=ridge, toward="base")
    torch.testing.assert_close(regmean(problem, shrink=1, ridge=ridge), expected)


def test_regmean_of_diagonals_weighs_each_column_by_its_energy(problem, dense, moments):
    energy = torch.stack([one.diagonal() for one in moments])[:, None]
    expected = (dense * energy).sum(0) / energy.sum(0)
    torch.testing.assert_close(regmean(problem, shrink=0, ridge=0), expected)


def test_regmean_between_is_the_formula_of_the_paper(problem, dense, moments):
    shrunk = [0.7 * one + 0.3 * torch.diag(one.diagonal()) for one in moments]
    expected = sum(change @ one for change, one in zip(dense, shrunk, strict=True)) @ torch.linalg.inv(sum(shrunk))
    torch.testing.assert_close(regmean(problem, shrink=0.7, ridge=0), expected)


def test_ties_of_agreeing_signs_is_the_mean():
    problem = by_hand([[1, -2], [3, -4]], [[5, -6], [1, -2]])
    torch.testing.assert_close(ties(problem, density=1.0), average(problem))


@pytest.mark.parametrize(
    ("density", "election", "expected"),
    [
        # The sums are [[2, -2], [6, 0.5]]; each entry is the mean of those that have its sign.
        (1.0, "total", [[4, -5], [2, 3]]),
        # Two of three are negative in the first entry, positive in the second; the last is a tie, which counts as +.
        (1.0, "frequency", [[-1, 1.5], [2, 3]]),
        # Left are 4 and -5 of the first, 2 and 3 of the second, 3 and -2.5 of the third.
        (0.5, "total", [[4, -5], [2.5, 3]]),
    ],
)
def test_ties_of_disagreeing_signs(density, election, expected):
    problem = by_hand([[4, -5], [1, 0]], [[-1, 1], [2, 3]], [[-1, 2], [3, -2.5]])
    found = ties(problem, density=density, majority_sign_method=election)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_ties_of_one_concept_is_its_largest_entries():
    problem = by_hand([[4, -5], [1, 0.5]])
    torch.testing.assert_close(ties(problem), torch.tensor([[4, -5], [0, 0]], dtype=torch.float64))
    torch.testing.assert_close(ties(problem, density=1.0), problem.changes[0].matrix())


def test_dare_is_the_average_in_expectation(problem, dense):
    density, seeds = 0.5, 1500
    mean = torch.stack([dare(problem, density=density, seed=seed) for seed in range(seeds)]).mean(0)
    # Each entry of a change is x / density with that probability, else 0: variance x² (1 - density) / density.
    deviation = (dense.square().sum(0) * (1 - density) / density / len(dense) ** 2 / seeds).sqrt()
    assert ((mean - dense.mean(0)).abs() <= 5 * deviation).all()


def test_dare_drops_or_divides_and_each_concept_for_itself():
    problem = by_hand(*[[[10.0**place] * 2] * 2 for place in range(3)])
    possible = {sum(part) for size in range(4) for part in combinations((1, 10, 100), size)}
    found = torch.stack([3 * 0.25 * dare(problem, density=0.25, seed=seed) for seed in range(60)])
    assert set(found.round(decimals=6).flatten().tolist()) == possible


def test_dare_repeats_itself_and_leaves_the_generator_alone(problem):
    before = torch.get_rng_state()
    first, again, other = (dare(problem, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_dare_of_all_entries_is_the_average(problem, dense):
    torch.testing.assert_close(dare(problem, density=1.0), dense.mean(0))


def few_rows(count: int, *, seed: int) -> Tensor:
    """Inputs of a concept that span fewer directions than there are, as the words of a prompt do."""
    return normal(count, IN, seed=seed)


def narrow(changes: list[Change | None], rows: list[Tensor], prior: Tensor | None = None) -> LayerProblem:
    """A problem whose moments are singular."""
    seen = [LayerStatistics(own.T @ own, len(own)) for own in rows]
    base = None if prior is None else LayerStatistics(prior.T @ prior, len(prior))
    return LayerProblem(torch.zeros(OUT, IN), changes, seen.__getitem__, [1.0] * len(changes), base, 1.0)


@pytest.mark.parametrize("regularized", [False, True])
def test_custom_diffusion_keeps_every_concept_on_its_own_inputs(regularized, changes, dense):
    rows = [few_rows(2, seed=seed) for seed in (31, 32, 33, 34)]
    found = custom_diffusion(narrow(changes, rows, few_rows(40, seed=35) if regularized else None))
    for change, own in zip(dense, rows, strict=True):
        torch.testing.assert_close(found @ own.T, change @ own.T, rtol=1e-8, atol=1e-8)


def test_custom_diffusion_is_the_closed_form_of_the_paper(changes, dense):
    rows, prior = [few_rows(2, seed=seed) for seed in (31, 32, 33, 34)], few_rows(40, seed=35)
    inputs, targets = torch.cat(rows), torch.cat([own @ one.T for own, one in zip(rows, dense, strict=True)])
    inverse = torch.linalg.inv(prior.T @ prior)
    expected = targets.T @ torch.linalg.inv(inputs @ inverse @ inputs.T) @ inputs @ inverse
    torch.testing.assert_close(custom_diffusion(narrow(changes, rows, prior), ridge=1e-14), expected)


def test_custom_diffusion_without_a_prior_is_the_least_change(changes, dense):
    rows = [few_rows(2, seed=seed) for seed in (31, 32, 33, 34)]
    inputs, targets = torch.cat(rows), torch.cat([own @ one.T for own, one in zip(rows, dense, strict=True)])
    torch.testing.assert_close(custom_diffusion(narrow(changes, rows)), (torch.linalg.pinv(inputs) @ targets).T)


def test_nothing_that_keeps_the_concepts_changes_other_prompts_less(changes):
    rows, prior = [few_rows(1, seed=seed) for seed in (31, 32, 33, 34)], few_rows(40, seed=35)
    found = custom_diffusion(narrow(changes, rows, prior), ridge=1e-12)
    free = torch.linalg.qr(torch.cat(rows).T, mode="complete").Q[:, 4:]  # no concept has anything there
    for seed in range(50):
        other = found + 10.0 ** (-seed % 5) * normal(OUT, IN - 4, seed=seed) @ free.T
        assert (found @ prior.T).norm() < (other @ prior.T).norm()
    # At the minimum, the effect on other prompts stands at right angles to all that is free.
    torch.testing.assert_close(found @ prior.T @ prior @ free, torch.zeros(OUT, IN - 4).double(), rtol=0, atol=1e-6)


def test_custom_diffusion_of_contradicting_concepts_is_least_squares(problem, moments):
    exact = gradient(problem, ridge=0.0, toward="base")
    torch.testing.assert_close(custom_diffusion(problem), exact)
    prior = LayerStatistics(moments[0], IN)
    regularized = LayerProblem(problem.base, problem.changes, problem.statistics, problem.weights, prior, 1.0)
    torch.testing.assert_close(custom_diffusion(regularized), exact)  # nothing is left free


def test_custom_diffusion_gives_up_inputs_below_the_cutoff(changes):
    quiet = torch.eye(IN, dtype=torch.float64)[:2] * torch.tensor([[1.0], [1e-4]]).double()
    found = custom_diffusion(narrow(changes[:1], [quiet]))
    torch.testing.assert_close(found[:, 0], changes[0].matrix()[:, 0])
    assert not found[:, 1:].any()
    all_of_it = custom_diffusion(narrow(changes[:1], [quiet]), cutoff=1e-9)
    torch.testing.assert_close(all_of_it[:, :2], changes[0].matrix()[:, :2])


def test_custom_diffusion_of_nothing_seen_is_no_change(changes):
    assert not custom_diffusion(narrow(changes[:1], [torch.zeros(3, IN).double()], few_rows(40, seed=35))).any()


def test_lbfgs_comes_near_the_exact_minimum(problem):
    found, exact = (problem.sums.objective(one) for one in (lbfgs(problem), gradient(problem, ridge=0, toward="base")))
    assert exact <= found * (1 + 1e-6)
    assert found == pytest.approx(exact, rel=1e-6)
    assert exact < problem.sums.objective(lbfgs(problem, iterations=2))


def test_lbfgs_keeps_one_concept_alone_nearly(changes, moments):
    alone = problem_of(changes[:1], moments[:1])
    torch.testing.assert_close(lbfgs(alone), changes[0].matrix(), rtol=0, atol=1e-3)


def test_lbfgs_counts_weights_and_the_prior_as_the_sums_do(problem, moments):
    prior = LayerStatistics(moments[0], IN, inputs=torch.linalg.cholesky(moments[0], upper=True))
    weighed = LayerProblem(problem.base, problem.changes, problem.statistics, [0.5, 2.0, 1.0, 0.5], prior, 0.3)
    exact = gradient(weighed, ridge=0.0, toward="base")
    torch.testing.assert_close(lbfgs(weighed), exact, rtol=0, atol=1e-3)
    assert (exact - gradient(problem, ridge=0.0, toward="base")).abs().max() > 0.1


def test_lbfgs_works_under_no_grad_and_leaves_the_base_alone(problem):
    before = problem.base.clone()
    with torch.no_grad():
        assert torch.equal(lbfgs(problem), lbfgs(problem))
    assert torch.equal(problem.base, before) and not problem.base.requires_grad


@pytest.fixture(scope="module")
def apart() -> list[Change | None]:
    """Three concepts tuned for orthogonal fusion, and one that does not change this layer."""
    basis = torch.linalg.qr(normal(IN, IN, seed=41)).Q
    tuned = [LowRank(basis[2 * k : 2 * k + 2], normal(OUT, 2, seed=42 + k)) for k in range(3)]
    return [*tuned, None]


def test_orthogonal_is_the_sum_and_each_concept_where_it_reads(apart, moments):
    found = orthogonal(problem_of(apart, moments))
    torch.testing.assert_close(found, sum(one.matrix() for one in apart[:3]))
    for one in apart[:3]:
        torch.testing.assert_close(found @ one.down.T, one.matrix() @ one.down.T)
    torch.testing.assert_close(orthogonal(problem_of(apart[:1], moments[:1])), apart[0].matrix())


def test_orthogonal_names_the_pair_that_overlaps_most(apart, moments):
    def turned(share: float) -> LowRank:
        return LowRank(apart[2].down + share * apart[0].down, apart[2].up)

    barely = [apart[0], apart[1], turned(1e-3), None]
    torch.testing.assert_close(
        orthogonal(problem_of(barely, moments)), sum(one.matrix() for one in barely[:3]), rtol=1e-9, atol=1e-9
    )
    with pytest.raises(SettingsError, match=r"concepts 1 and 3 .* tune each with its own unet\.orthogonal_slice"):
        orthogonal(problem_of([apart[0], apart[1], turned(1.0), None], moments))
    with pytest.raises(SettingsError, match="concepts 1 and 3 .* more than 0.0001"):
        orthogonal(problem_of(barely, moments), tolerance=1e-4)


def test_orthogonal_refuses_full_changes(apart, moments):
    with pytest.raises(SettingsError, match="concept 2 of this fusion is not low-rank"):
        orthogonal(problem_of([apart[0], Full(apart[1].matrix())], moments[:2]))


@pytest.fixture
def accepted(method, changes, apart) -> list[Change | None]:
    """The changes that a method is tried on: any, but `orthogonal` is only for those that do not meet."""
    return apart if method == "orthogonal" else changes


@pytest.mark.parametrize("method", METHODS)
def test_no_change_is_a_change_of_zero(method, accepted, moments):
    zero = LowRank(torch.zeros(1, IN), torch.zeros(OUT, 1))
    found = METHODS[method](problem_of([zero if one is None else one for one in accepted], moments))
    torch.testing.assert_close(METHODS[method](problem_of(accepted, moments)), found)
    assert torch.equal(METHODS[method](problem_of([None, None], moments[:2])), torch.zeros(OUT, IN).double())


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_whole_changes_in_double(method, accepted, moments):
    problem = problem_of(accepted, moments)
    found = METHODS[method](problem)
    assert (found.shape, found.dtype) == ((OUT, IN), torch.float64)
    assert torch.equal(found, METHODS[method](problem))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"density": 0}, "'density'.*greater than 0, found 0"),
        ("ties", {"density": math.nan}, "found nan"),
        ("ties", {"majority_sign_method": "most"}, "'total' or 'frequency', found most"),
        ("dare", {"density": 1.5}, "found 1.5"),
        ("svd", {"rank": 0}, "'rank'.*greater than or equal to 1, found 0"),
        ("regmean", {"shrink": -0.1}, "'shrink'.*greater than or equal to 0, found -0.1"),
        ("lbfgs", {"iterations": 0}, "'iterations'.*greater than or equal to 1, found 0"),
        ("custom-diffusion", {"ridge": 0}, "'ridge'.*greater than 0, found 0"),
        ("custom-diffusion", {"cutoff": 1}, "'cutoff'.*less than 1, found 1"),
        ("custom-diffusion", {"picture.cutoff": 1}, "'cutoff'.*less than 1, found 1"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_recorded(method, options, message):
    with pytest.raises(SettingsError, match=message):
        check_method(FusionSettings(method=method, options=options, refine=0))
