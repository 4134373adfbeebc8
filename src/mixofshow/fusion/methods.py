"""Fusion methods: one decorated pure function each. Its signature is its schema: command line and YAML offer it.

A method takes the concepts' changes of one layer and the layer's sums, and returns one change of the weight,
(out, in) in double precision. Keyword-only parameters with defaults are its settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.concepts.concept import Change
from mixofshow.errors import SettingsError, nearest
from mixofshow.fusion.statistics import LayerSums

Method = Callable[..., Tensor]
METHODS: Final[dict[str, Method]] = {}


def fusion_method(name: str) -> Callable[[Method], Method]:
    """Enter a function into METHODS."""

    def enter(function: Method) -> Method:
        METHODS[name] = function
        return function

    return enter


@fusion_method("gradient")
def gradient(
    changes: Sequence[Change | None], sums: LayerSums, *, ridge: float = 0.1, toward: str = "average"
) -> Tensor:
    """Gradient fusion (Mix-of-Show §3.3, eq. 4) by its exact answer, damped: (Σ ΔW_i C_i + λ D)(Σ C_i + λI)⁻¹.

    This minimizes Σ ‖(ΔW_i − ΔW) X_i‖² + λ ‖ΔW − D‖², λ being `ridge` times the mean diagonal of Σ C_i. Where the
    recorded inputs say little, the answer stays near D: the mean of the changes (`toward` "average"; then one concept
    alone is kept exactly, and the objective is never above weight fusion's) or no change ("base"; as λ goes to 0 this
    is the solution nearest to the base weight, which the paper's LBFGS approaches). Too small a ridge fits the
    recorded prompts at the cost of all others.
    """
    if toward not in ("average", "base"):
        raise SettingsError(f"toward: expected average or base, found {toward!r}")
    middle = average(changes, sums) if toward == "average" else torch.zeros_like(sums.pulls)
    # Solved for the distance from D, so that rounding does not grow with D.
    return middle + solve_ridge(sums.moments, sums.pulls - middle @ sums.moments, ridge)


@fusion_method("average")
def average(changes: Sequence[Change | None], sums: LayerSums) -> Tensor:
    """Weight fusion, the paper's baseline: the mean of the changes, Σ ΔW_i / n."""
    total = torch.zeros_like(sums.pulls)
    for change in changes:
        if change is not None:
            total += change.matrix(dtype=total.dtype).to(total.device)
    return total / len(changes)


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
    """The method's settings: its defaults with the given ones. Raises SettingsError for unknown names."""
    if name not in METHODS:
        raise SettingsError(f"unknown fusion method '{name}'{nearest(name, METHODS)}")
    parameters = inspect.signature(METHODS[name]).parameters.values()
    known = {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
    for key in given:
        if key not in known:
            raise SettingsError(f"fusion method '{name}' has no setting '{key}'{nearest(key, known)}")
    return {**known, **given}
