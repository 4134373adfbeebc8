"""A guard against loud concepts: least squares has no defence of its own against one whose change is far too large.

What it cannot see is a concept that is bad and quiet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Final

from torch import Tensor

from mixofshow.concepts.concept import Full
from mixofshow.fusion.problem import LayerProblem

LOUD: Final = 3.0
"""A concept is loud in a layer when ‖ΔW_i X_i‖ is over so many times the median of the others."""
HARM: Final = 0.1
"""How much a loud concept may raise what is left undone for the others, as a share of it without that concept."""
HALVINGS: Final = 40


def guarded(problem: LayerProblem, solver: Callable[[LayerProblem], Tensor]) -> tuple[LayerProblem, dict[int, float]]:
    """The problem with loud concepts turned down, and the weight that each of them was left.

    A loud change is first scaled to the loudest that passes; its weight is then halved until it harms the others by no
    more than HARM.
    """
    loudness = _loudness(problem)
    left: dict[int, float] = {}
    for number, own in enumerate(loudness):
        others = [other for k, other in enumerate(loudness) if k != number and other > 0]
        if not others or own <= LOUD * median(others):
            continue
        problem = _scaled(problem, number, LOUD * median(others) / own)
        problem = _harmless(problem, number, solver)
        left[number] = problem.weights[number]
    return problem, left


def undone_of_others(problem: LayerProblem, number: int, change: Tensor) -> float:
    """What a change leaves undone of what all concepts but one want: Σ w_k ‖(ΔW_k − change) X_k‖²."""
    others = [k for k in range(len(problem.changes)) if k != number]
    return sum(problem.weights[k] * problem.residual(k, change)[0] for k in others)


def _harmless(problem: LayerProblem, number: int, solver: Callable[[LayerProblem], Tensor]) -> LayerProblem:
    """The problem with one concept's weight so low that it does the others no more than HARM."""
    allowed = (1 + HARM) ** 2 * undone_of_others(problem, number, solver(problem.without(number)))
    for _ in range(HALVINGS):
        if undone_of_others(problem, number, solver(problem)) <= allowed:
            return problem
        problem = problem.weighed([w / 2 if k == number else w for k, w in enumerate(problem.weights)])
    return problem


def _loudness(problem: LayerProblem) -> list[float]:
    return [math.sqrt(problem.residual(k, problem.zero())[1]) for k in range(len(problem.changes))]


def _scaled(problem: LayerProblem, number: int, factor: float) -> LayerProblem:
    changes = [
        Full(one.matrix(factor)) if one is not None and k == number else one for k, one in enumerate(problem.changes)
    ]
    return replace(problem, changes=changes)
