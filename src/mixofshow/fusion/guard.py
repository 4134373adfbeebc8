"""A guard against loud concepts: least squares has no defence of its own against one whose change is far too large.

What it cannot see is a concept that is bad and quiet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from statistics import median
from typing import Final

from torch import Tensor

from mixofshow.fusion.problem import LayerProblem

LOUD: Final = 3.0
"""A concept is loud in a layer when ‖ΔW_i X_i‖ is over so many times the median of the others."""
HARM: Final = 0.1
"""How much a loud concept may raise what is left undone for the others, as a share of it without that concept."""
HALVINGS: Final = 40


def guarded(problem: LayerProblem, solver: Callable[[LayerProblem], Tensor]) -> tuple[LayerProblem, dict[int, float]]:
    """The problem with loud concepts turned down, and the weight that each of them was left.

    A loud change is first scaled to the loudest that passes. The weights of all loud ones are then halved until
    together they harm the others by no more than HARM; where no weight is low enough, they are left out: weight 0.
    """
    loudness = _loudness(problem)
    loud: list[int] = []
    for number, own in enumerate(loudness):
        others = [other for k, other in enumerate(loudness) if k != number and other > 0]
        if others and own > LOUD * median(others):
            loud.append(number)
            problem = _scaled(problem, number, LOUD * median(others) / own)
    if loud:
        problem = _harmless(problem, loud, solver)
    return problem, {number: problem.weights[number] for number in loud}


def undone_of_others(problem: LayerProblem, number: int, change: Tensor) -> float:
    """What a change leaves undone of what all concepts but one want: Σ w_k ‖(ΔW_k − change) X_k‖²."""
    return _undone(problem, [k for k in range(len(problem.changes)) if k != number], change)


def _undone(problem: LayerProblem, numbers: Sequence[int], change: Tensor) -> float:
    """What a change leaves undone of what some concepts want."""
    return sum(problem.weights[k] * problem.residual(k, change)[0] for k in numbers)


def _harmless(problem: LayerProblem, loud: Collection[int], solver: Callable[[LayerProblem], Tensor]) -> LayerProblem:
    """The problem with the loud concepts' weights so low that they do the others no more than HARM."""
    others = [k for k in range(len(problem.changes)) if k not in loud]
    allowed = (1 + HARM) ** 2 * _undone(problem, others, solver(problem.without(*loud)))
    for _ in range(HALVINGS):
        if _undone(problem, others, solver(problem)) <= allowed:
            return problem
        problem = problem.weighed([w / 2 if k in loud else w for k, w in enumerate(problem.weights)])
    # Methods that do not weigh count every change, so it must go as well.
    changes = [None if k in loud else one for k, one in enumerate(problem.changes)]
    return replace(problem, changes=changes, weights=[0.0 if k in loud else w for k, w in enumerate(problem.weights)])


def _loudness(problem: LayerProblem) -> list[float]:
    return [math.sqrt(problem.residual(k, problem.zero())[1]) for k in range(len(problem.changes))]


def _scaled(problem: LayerProblem, number: int, factor: float) -> LayerProblem:
    changes = [one.scaled(factor) if one and k == number else one for k, one in enumerate(problem.changes)]
    return replace(problem, changes=changes)
