"""Fusion methods: one decorated pure function each. Its signature is its schema: command line and YAML offer it.

A method takes the problem of one layer (the concepts' changes of it, and what it saw) and returns one change of the
weight, (out, in) in double precision. Keyword-only parameters with defaults are its settings; their types say what may
be given, and `method_settings` checks it before anything is recorded.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Final, Literal, get_type_hints

import torch
from peft.utils import merge_utils
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional

from mixofshow.concepts.changes import LowRank
from mixofshow.errors import SettingsError, nearest, shown
from mixofshow.fusion.contrast import Contrast
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.statistics import LayerStatistics

Method = Callable[..., Tensor]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
METHODS: Final[dict[str, Method]] = {}
KEEPS_INPUTS: Final[set[str]] = set()
"""Those that need the inputs themselves, row by row."""
NEEDS_STATISTICS: Final[set[str]] = set()
"""Those that look at what layers see; for the others nothing need be recorded."""
STAGE_DEFAULTS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "lbfgs": {"picture": {"iterations": 50}},  # as in the paper's code
}
"""Settings that a method has by default in some stage only; whatever is given stands above them."""


def fusion_method(
    name: str, *, needs_statistics: bool = True, keeps_inputs: bool = False
) -> Callable[[Method], Method]:
    """Enter a function into METHODS, and say whether it looks at what layers see: their moments, or the inputs too."""

    def enter(function: Method) -> Method:
        METHODS[name] = function
        if keeps_inputs:
            KEEPS_INPUTS.add(name)
        if needs_statistics:
            NEEDS_STATISTICS.add(name)
        return function

    return enter


@fusion_method("gradient")
def gradient(problem: LayerProblem, *, ridge: float = 0.03, toward: Literal["average", "base"] = "average") -> Tensor:
    """Gradient fusion (Mix-of-Show §3.3, eq. 4) by its exact answer, damped: (Σ ΔW_i C_i + λ D)(Σ C_i + λI)⁻¹.

    This minimizes Σ ‖(ΔW_i − ΔW) X_i‖² + λ ‖ΔW − D‖², λ being `ridge` times the mean diagonal of Σ C_i. Where the
    recorded inputs say little, the answer stays near D: the mean of the changes (`toward` "average"; then one concept
    alone is kept exactly, and the objective is never above weight fusion's) or no change ("base"; as λ goes to 0 this
    is the solution nearest to the base weight, which the paper's LBFGS approaches). Too small a ridge fits the
    recorded prompts at the cost of all others.
    """
    sums = problem.sums
    middle = mean(problem) if toward == "average" else problem.zero()
    # Solved for the distance from D, so that rounding does not grow with D.
    return middle + solve_ridge(sums.moments, sums.rhs - middle @ sums.moments, ridge)


@fusion_method("contrastive")
def contrastive(
    problem: LayerProblem,
    *,
    ridge: float = 0.03,
    margin: Annotated[float, Field(ge=0, le=2)] = 1.0,
    rounds: Annotated[int, Field(ge=1, le=100)] = 3,
) -> Tensor:
    """Contrastive fusion, after LoRACLR (Simsar et al., CVPR 2025, arXiv:2412.09622): kept away from the other concepts.

    Gradient fusion's objective, and for each concept i the mean over the others j of max(0, m ‖(ΔW_i − ΔW_j) X_i‖ −
    ‖(ΔW − ΔW_j) X_i‖)²: on what i reads, the fused layer is to be m (`margin`) times as far from j as i itself is. In the
    paper negative pairs are what j makes of its own inputs, at one margin for all layers, and AdamW minimizes; here they
    are what j makes of i's, for which moments are enough. Where the slope is 0,

        ΔW = (Σ w_i (ΔW_i − Σ_j a_ij ΔW_j) C_i + λ D)(Σ w_i (1 − Σ_j a_ij) C_i + λI)⁻¹

    with λ and D as in gradient fusion and a_ij of `Contrast.of`. That is solved by turns, from gradient fusion on, for at
    most so many `rounds`; the best that is met is taken. At margin 0, and where nobody is near, it is gradient fusion.
    """
    contrast, middle = Contrast(problem, margin), mean(problem)
    damping = ridge * problem.sums.moments.diagonal().mean()
    best = found = gradient(problem, ridge=ridge)
    least = float("inf")
    for _ in range(rounds + 1):
        loss, shares = contrast.of(found)
        loss += float(damping * (found - middle).square().sum())
        if loss >= least:
            break
        best, least = found, loss
        if not shares.any():
            break
        sums = contrast.sums(shares)
        damped = sums.moments + damping * torch.eye(len(sums.moments)).to(sums.moments)
        found = middle + solve_ridge(damped, sums.rhs - middle @ sums.moments, 0.0)
    return best


@fusion_method("lbfgs", keeps_inputs=True)
def lbfgs(problem: LayerProblem, *, iterations: Count = 500) -> Tensor:
    """Gradient fusion as the paper's own code solves it (Mix-of-Show §3.3): LBFGS on the stored inputs, begun at W0.

    Minimizes the mean square of (W0 + ΔW_i) X_i − W X_i over the rows of all concepts, in the base weight's precision
    (half precision in single), and returns the best W that it met. Here to compare with: `gradient` has the minimum
    itself from the moments alone (ridge 1e-6 toward the base).
    """
    inputs, targets = _regression(problem)
    weight = problem.base.detach().to(inputs.dtype, copy=True).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        lr=1,
        max_iter=iterations,
        history_size=25,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-16,
        tolerance_change=1e-16,
    )
    best, least = problem.base, float("inf")

    def loss() -> float:
        nonlocal best, least
        optimizer.zero_grad()
        found = functional.mse_loss(functional.linear(inputs, weight), targets)
        if (value := float(found.detach())) < least:
            best, least = weight.detach().clone(), value
        found.backward()
        return value

    optimizer.step(loss)
    return best.double() - problem.base.double()


def _regression(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """All rows √w_i X_i, (rows, in), and what they should be mapped to, (rows, out); of the prior, what W0 says."""
    kind = torch.promote_types(problem.base.dtype, torch.float32)
    terms = [
        (problem.statistics(number), change, weight)
        for number, (change, weight) in enumerate(zip(problem.matrices(), problem.weights, strict=True))
    ]
    if problem.prior is not None:
        terms.append((problem.prior, problem.zero(), problem.prior_weight))
    inputs, targets = [], []
    for seen, change, weight in terms:
        if seen.inputs is None:
            raise SettingsError("method 'lbfgs': needs the inputs row by row, which were not kept")
        inputs.append(weight**0.5 * seen.inputs.to(problem.base.device, kind))
        targets.append(functional.linear(inputs[-1], (problem.base.double() + change).to(kind)))
    return torch.cat(inputs), torch.cat(targets)


@fusion_method("custom-diffusion")
def custom_diffusion(
    problem: LayerProblem, *, ridge: Positive = 1e-4, cutoff: Annotated[float, Field(gt=0, lt=1)] = 1e-6
) -> Tensor:
    """Custom Diffusion's constrained merge (Kumari et al. 2023, arXiv:2212.04488, eq. 4) in closed form.

    min ‖ΔW C_reg‖ subject to ΔW X_i = ΔW_i X_i for the inputs of all concepts: ΔW = V (Uᵀ R⁻¹ U)⁻¹ Uᵀ R⁻¹. U spans
    the inputs: it holds the eigenvectors of Σ C_i whose eigenvalue is above `cutoff` times the largest. V is what
    they should be mapped to. R is C_reg C_regᵀ, the moments of the base's own prompts (the fusion's `prior`), damped
    by `ridge` times their mean diagonal; without a prior it is the identity, and the change is the smallest of all.
    Directions outside U are free: there the change may grow large for the prior's sake, the more the smaller the ridge.

    The paper merges keys and values, where rows are fewer than dimensions. Where constraints contradict each other,
    as in most other layers, V is their least-squares solution, through the pseudo-inverse of Σ C_i with that cut-off.
    """
    sums = dataclasses.replace(problem, prior=None).sums
    values, vectors = torch.linalg.eigh(sums.moments)
    kept = values > cutoff * values.max()
    spanning = vectors[:, kept]  # U
    mapped = sums.rhs @ spanning / values[kept]  # V
    if problem.prior is None:
        return mapped @ spanning.T
    moments = problem.prior.moments
    others = moments + ridge * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)  # R
    weighed = torch.cholesky_solve(spanning, torch.linalg.cholesky(others))  # R⁻¹ U
    return mapped @ torch.linalg.solve(spanning.T @ weighed, weighed.T)


def mean(problem: LayerProblem) -> Tensor:
    """The changes' plain mean, Σ ΔW_i / n: weight fusion as the paper has it, whatever the weights."""
    return total(problem) / len(problem.changes)


@fusion_method("average", needs_statistics=False)
def average(problem: LayerProblem) -> Tensor:
    """Weight fusion, the paper's baseline: the mean of the changes, Σ w_i ΔW_i / Σ w_i."""
    return _total(problem, problem.weights) / sum(problem.weights)


@fusion_method("sum", needs_statistics=False)
def total(problem: LayerProblem) -> Tensor:
    """Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089) at scale 1: Σ ΔW_i, as when adapters are simply added."""
    return _total(problem, [1.0] * len(problem.changes))


@fusion_method("orthogonal", needs_statistics=False)
def orthogonal(problem: LayerProblem, *, tolerance: float = 0.01) -> Tensor:
    """Orthogonal Adaptation (Po et al. 2023, arXiv:2312.02432): Σ ΔW_i of changes that cannot meet.

    Such concepts were tuned with `orthogonal_slice`: the down matrix A_i of ΔW_i = B_i A_i is fixed to rows of one
    orthogonal basis that no other concept has. ΔW_j is then zero on all that ΔW_i reads, and the sum is there ΔW_i.
    Refused when ‖A_i A_jᵀ‖ is more than `tolerance` times ‖A_i‖ ‖A_j‖ for any two concepts.
    """
    overlaps = _overlaps(problem)
    first, second = worst = max(overlaps, key=overlaps.__getitem__, default=(0, 0))
    if overlaps.get(worst, 0.0) > tolerance:
        raise SettingsError(
            f"method 'orthogonal': concepts {first} and {second} of this fusion overlap by {overlaps[worst]:.2g}, more "
            f"than {tolerance:g}; {_TUNE_APART}"
        )
    return total(problem)


_TUNE_APART: Final = "tune each with its own unet.orthogonal_slice and text_encoder.orthogonal_slice"


def _overlaps(problem: LayerProblem) -> dict[tuple[int, int], float]:
    """‖A_i A_jᵀ‖ / ‖A_i‖ ‖A_j‖ by the positions of two concepts, counted from 1. Raises SettingsError."""
    downs: dict[int, Tensor] = {}
    for position, change in enumerate(problem.changes, 1):
        if isinstance(change, LowRank):
            downs[position] = functional.normalize(change.down.double().flatten(), dim=0).view_as(change.down)
        elif change is not None:
            raise SettingsError(
                f"method 'orthogonal': the change of concept {position} of this fusion is not low-rank; {_TUNE_APART}"
            )
    return {(one, other): float((downs[one] @ downs[other].T).norm()) for one, other in combinations(downs, 2)}


def _total(problem: LayerProblem, weights: Sequence[float]) -> Tensor:
    found = problem.zero()
    for change, weight in zip(problem.changes, weights, strict=True):
        if change is not None:
            change.add_to(found, weight)
    return found


@fusion_method("ties", needs_statistics=False)
def ties(
    problem: LayerProblem, *, density: Share = 0.5, majority_sign_method: Literal["total", "frequency"] = "total"
) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): trim each change to its largest entries, elect signs, average.

    Of each change the `density` largest entries stay, unscaled. Every entry then takes the sign of the changes' sum
    ("total") or of most changes ("frequency"), and is the mean of the entries that have that sign. A concept with
    nothing there is not counted, so agreeing changes are not thinned by n. One concept alone is its trimmed change.
    """
    # The disjoint mean already divides by the number of concepts that agree, so all weights are 1.
    matrices = problem.matrices()
    with warnings.catch_warnings(action="ignore"):  # peft warns where a density of 1 prunes nothing, as it should
        return merge_utils.ties(matrices, problem.zero().new_ones(len(matrices)), density, majority_sign_method)


@fusion_method("dare", needs_statistics=False)
def dare(problem: LayerProblem, *, density: Share = 0.5, seed: int = 0) -> Tensor:
    """DARE (Yu et al. 2023, arXiv:2311.03099): drop entries at random, divide the rest by `density`, take the mean.

    Over all seeds the expectation is weight fusion's change. Concepts drop different entries; layers of one shape
    drop the same ones. Masks are drawn on the CPU, so that all devices drop alike; the global generator is left as
    it was.
    """
    matrices = [matrix.cpu() for matrix in problem.matrices()]
    shares = torch.full((len(matrices),), 1 / len(matrices), dtype=torch.float64)
    # peft draws from the global generator of the CPU; `torch.manual_seed` would seed the accelerators' as well.
    with torch.random.fork_rng(devices=()), warnings.catch_warnings(action="ignore"):
        torch.default_generator.manual_seed(seed)
        return merge_utils.dare_linear(matrices, shares, density).to(problem.base.device)


@fusion_method("svd", needs_statistics=False)
def svd(problem: LayerProblem, *, rank: Count = 8) -> Tensor:
    """The mean of the changes, cut to a rank: U_r S_r V_rᵀ, the nearest matrix of that rank (Eckart–Young).

    This is what is left of weight fusion when the fused model must again be one LoRA.
    """
    left, values, right = torch.linalg.svd(average(problem), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@fusion_method("regmean")
def regmean(problem: LayerProblem, *, shrink: Annotated[float, Field(ge=0, le=1)] = 0.9, ridge: float = 1e-6) -> Tensor:
    """RegMean (Jin et al. 2023, arXiv:2212.09849): (Σ ΔW_i C̃_i)(Σ C̃_i + λI)⁻¹, C̃_i = α C_i + (1 − α) diag(C_i).

    α is `shrink`: at 1 this is gradient fusion `toward` the base; at 0 each input column of the weight is a mean of
    the concepts' columns, weighted by that input's energy. λ only guards inputs that were never seen; the paper has
    none.
    """

    def shrunk(seen: LayerStatistics) -> LayerStatistics:
        diagonal = seen.moments.diagonal().diag()
        return dataclasses.replace(seen, moments=shrink * seen.moments + (1 - shrink) * diagonal)

    prior = None if problem.prior is None else shrunk(problem.prior)
    sums = dataclasses.replace(problem, statistics=lambda number: shrunk(problem.statistics(number)), prior=prior).sums
    return solve_ridge(sums.moments, sums.rhs, ridge)


def solve_ridge(moments: Tensor, rhs: Tensor, ridge: float) -> Tensor:
    """rhs (moments + λI)⁻¹ with λ = ridge · mean diagonal. (in, in), (out, in) -> (out, in).

    By Cholesky in double precision, which is reproducible; where the matrix is not positive definite, by eigenvalues,
    leaving out directions that no input has.
    """
    scale = moments.diagonal().mean()
    if scale == 0:
        return torch.zeros_like(rhs)
    damped = moments + ridge * scale * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        return torch.cholesky_solve(rhs.T, factor).T
    values, vectors = torch.linalg.eigh(damped)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(kept, 1 / values, 0)
    return rhs @ (vectors * inverse) @ vectors.T


def require_known(name: str) -> None:
    """Raise SettingsError unless there is a method of this name."""
    if name not in METHODS:
        hint = nearest(name, METHODS) or f"; known are {', '.join(METHODS)}"
        raise SettingsError(f"unknown fusion method '{shown(name)}'{hint}")


def method_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's settings: its defaults with the given ones. Raises SettingsError for unknown names and wrong types."""
    require_known(name)
    parameters = inspect.signature(METHODS[name]).parameters.values()
    known = {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
    kinds, settings = get_type_hints(METHODS[name], include_extras=True), dict(known)
    for key, value in given.items():
        if key not in known:
            raise SettingsError(f"fusion method '{name}' has no setting '{key}'{nearest(key, known)}")
        try:
            settings[key] = TypeAdapter(kinds[key]).validate_python(value)  # YAML reads 1e-6 as a text
        except ValidationError as error:
            raise SettingsError(f"'{key}': {error.errors()[0]['msg'].lower()}, found {shown(value)}") from error
    return settings
