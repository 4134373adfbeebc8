"""The fusion methods for comparison against closed forms, on matrices small enough to check by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from mixofshow.concepts.concept import Change, Full, LowRank
from mixofshow.errors import SettingsError
from mixofshow.fusion.methods import METHODS, average, dare, gradient, regmean, svd, ties, total
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.statistics import Seen

OUT, IN = 6, 10


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem_of(changes: list[Change | None], moments: list[Tensor], shape: tuple[int, int] = (OUT, IN)) -> LayerProblem:
    seen = [Seen(one, IN) for one in moments]
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


@pytest.mark.parametrize("method", METHODS)
def test_no_change_is_a_change_of_zero(method, problem, changes, moments):
    zeros = [Full(torch.zeros(OUT, IN)) if one is None else one for one in changes]
    found = METHODS[method](problem_of(zeros, moments))
    torch.testing.assert_close(METHODS[method](problem), found)
    assert torch.equal(METHODS[method](problem_of([None, None], moments[:2])), torch.zeros(OUT, IN).double())


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_whole_changes_in_double(method, problem):
    found = METHODS[method](problem)
    assert (found.shape, found.dtype) == ((OUT, IN), torch.float64)
    assert torch.equal(found, METHODS[method](problem))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (ties, {"density": 0}, "density: expected more than 0 and at most 1, found 0"),
        (ties, {"density": math.nan}, "found nan"),
        (ties, {"majority_sign_method": "most"}, "expected total or frequency, found 'most'"),
        (dare, {"density": 1.5}, "found 1.5"),
        (svd, {"rank": 0}, "rank: expected at least 1, found 0"),
        (regmean, {"shrink": -0.1}, "shrink: expected 0 to 1, found -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(method, options, message, problem):
    with pytest.raises(SettingsError, match=message):
        method(problem, **options)
