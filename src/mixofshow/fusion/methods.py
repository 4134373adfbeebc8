"""Fusion methods: one decorated pure function each. Its signature is its schema: command line and YAML offer it.

A method takes the problem of one layer (the concepts' changes of it, and what it saw) and returns one change of the
weight, (out, in) in double precision. Keyword-only parameters with defaults are its settings.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, get_args, get_type_hints

import torch
from peft.utils import merge_utils
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mixofshow.errors import SettingsError, nearest, shown
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.statistics import Seen

Method = Callable[..., Tensor]
Goal = Literal["average", "base"]
Election = Literal["total", "frequency"]
METHODS: Final[dict[str, Method]] = {}
KEEPS_INPUTS: Final[set[str]] = set()
"""Those that need the inputs themselves, row by row."""


def fusion_method(name: str, *, keeps_inputs: bool = False) -> Callable[[Method], Method]:
    """Enter a function into METHODS."""

    def enter(function: Method) -> Method:
        METHODS[name] = function
        if keeps_inputs:
            KEEPS_INPUTS.add(name)
        return function

    return enter


@fusion_method("gradient")
def gradient(problem: LayerProblem, *, ridge: float = 0.1, toward: Goal = "average") -> Tensor:
    """Gradient fusion (Mix-of-Show §3.3, eq. 4) by its exact answer, damped: (Σ ΔW_i C_i + λ D)(Σ C_i + λI)⁻¹.

    This minimizes Σ ‖(ΔW_i − ΔW) X_i‖² + λ ‖ΔW − D‖², λ being `ridge` times the mean diagonal of Σ C_i. Where the
    recorded inputs say little, the answer stays near D: the mean of the changes (`toward` "average"; then one concept
    alone is kept exactly, and the objective is never above weight fusion's) or no change ("base"; as λ goes to 0 this
    is the solution nearest to the base weight, which the paper's LBFGS approaches). Too small a ridge fits the
    recorded prompts at the cost of all others.
    """
    _check_choice("toward", toward, Goal)
    sums = problem.sums
    middle = average(problem) if toward == "average" else problem.zero()
    # Solved for the distance from D, so that rounding does not grow with D.
    return middle + solve_ridge(sums.moments, sums.pulls - middle @ sums.moments, ridge)


@fusion_method("average")
def average(problem: LayerProblem) -> Tensor:
    """Weight fusion, the paper's baseline: the mean of the changes, Σ w_i ΔW_i / Σ w_i."""
    return _total(problem, problem.weights) / sum(problem.weights)


@fusion_method("sum")
def total(problem: LayerProblem) -> Tensor:
    """Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089) at scale 1: Σ ΔW_i, as when adapters are simply added."""
    return _total(problem, [1.0] * len(problem.changes))


def _total(problem: LayerProblem, weights: Sequence[float]) -> Tensor:
    found = problem.zero()
    for change, weight in zip(problem.changes, weights, strict=True):
        if change is not None:
            found.add_(change.matrix(dtype=found.dtype).to(found.device), alpha=weight)
    return found


@fusion_method("ties")
def ties(problem: LayerProblem, *, density: float = 0.5, majority_sign_method: Election = "total") -> Tensor:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): trim each change to its largest entries, elect signs, average.

    Of each change the `density` largest entries stay, unscaled. Every entry then takes the sign of the changes' sum
    ("total") or of most changes ("frequency"), and is the mean of the entries that have that sign. A concept with
    nothing there is not counted, so agreeing changes are not thinned by n. One concept alone is its trimmed change.
    """
    _check_share("density", density)
    _check_choice("majority_sign_method", majority_sign_method, Election)
    # The disjoint mean already divides by the number of concepts that agree, so all weights are 1.
    matrices = problem.matrices()
    with warnings.catch_warnings(action="ignore"):  # peft warns where a density of 1 prunes nothing, as it should
        return merge_utils.ties(matrices, problem.zero().new_ones(len(matrices)), density, majority_sign_method)


@fusion_method("dare")
def dare(problem: LayerProblem, *, density: float = 0.5, seed: int = 0) -> Tensor:
    """DARE (Yu et al. 2023, arXiv:2311.03099): drop entries at random, divide the rest by `density`, take the mean.

    Over all seeds the expectation is weight fusion's change. Concepts drop different entries; layers of one shape
    drop the same ones. Masks are drawn on the CPU, so that all devices drop alike; the global generator is left as
    it was.
    """
    _check_share("density", density)
    matrices = [matrix.cpu() for matrix in problem.matrices()]
    shares = torch.full((len(matrices),), 1 / len(matrices), dtype=torch.float64)
    # peft draws from the global generator of the CPU; `torch.manual_seed` would seed the accelerators' as well.
    with torch.random.fork_rng(devices=()), warnings.catch_warnings(action="ignore"):
        torch.default_generator.manual_seed(seed)
        return merge_utils.dare_linear(matrices, shares, density).to(problem.base.device)


@fusion_method("svd")
def svd(problem: LayerProblem, *, rank: int = 8) -> Tensor:
    """The mean of the changes, cut to a rank: U_r S_r V_rᵀ, the nearest matrix of that rank (Eckart–Young).

    This is what is left of weight fusion when the fused model must again be one LoRA.
    """
    if rank < 1:
        raise SettingsError(f"rank: expected at least 1, found {rank}")
    left, values, right = torch.linalg.svd(average(problem), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@fusion_method("regmean")
def regmean(problem: LayerProblem, *, shrink: float = 0.9, ridge: float = 1e-6) -> Tensor:
    """RegMean (Jin et al. 2023, arXiv:2212.09849): (Σ ΔW_i C̃_i)(Σ C̃_i + λI)⁻¹, C̃_i = α C_i + (1 − α) diag(C_i).

    α is `shrink`: at 1 this is gradient fusion `toward` the base; at 0 each input column of the weight is a mean of
    the concepts' columns, weighted by that input's energy. λ only guards inputs that were never seen; the paper has
    none.
    """
    if not 0 <= shrink <= 1:
        raise SettingsError(f"shrink: expected 0 to 1, found {shrink}")

    def shrunk(seen: Seen) -> Seen:
        diagonal = seen.moments.diagonal().diag()
        return dataclasses.replace(seen, moments=shrink * seen.moments + (1 - shrink) * diagonal)

    prior = None if problem.prior is None else shrunk(problem.prior)
    sums = dataclasses.replace(problem, look=lambda number: shrunk(problem.look(number)), prior=prior).sums
    return solve_ridge(sums.moments, sums.pulls, ridge)


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise SettingsError(f"{name}: expected {' or '.join(get_args(choices))}, found {value!r}")


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise SettingsError(f"{name}: expected more than 0 and at most 1, found {value}")


def solve_ridge(moments: Tensor, pulls: Tensor, ridge: float) -> Tensor:
    """pulls (moments + λI)⁻¹ with λ = ridge · mean diagonal. (in, in), (out, in) -> (out, in).

    By Cholesky in double precision, which is reproducible; where the matrix is not positive definite, by eigenvalues,
    leaving out directions that no input has.
    """
    scale = moments.diagonal().mean()
    if scale == 0:
        return torch.zeros_like(pulls)
    damped = moments + ridge * scale * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        return torch.cholesky_solve(pulls.T, factor).T
    values, vectors = torch.linalg.eigh(damped)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(kept, 1 / values, 0)
    return pulls @ (vectors * inverse) @ vectors.T


def method_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's settings: its defaults with the given ones. Raises SettingsError for unknown names and wrong types."""
    if name not in METHODS:
        raise SettingsError(f"unknown fusion method '{name}'{nearest(name, METHODS)}")
    parameters = inspect.signature(METHODS[name]).parameters.values()
    known = {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
    kinds, settings = get_type_hints(METHODS[name]), dict(known)
    for key, value in given.items():
        if key not in known:
            raise SettingsError(f"fusion method '{name}' has no setting '{key}'{nearest(key, known)}")
        try:
            settings[key] = TypeAdapter(kinds[key]).validate_python(value)  # YAML reads 1e-6 as a text
        except ValidationError as error:
            raise SettingsError(f"'{key}': {error.errors()[0]['msg'].lower()}, found {shown(value)}") from error
    return settings
