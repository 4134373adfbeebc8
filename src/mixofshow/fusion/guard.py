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
from mixofshow.fusion.statistics import Seen

LOUD: Final = 3.0
"""A concept is loud in a layer when ‖ΔW_i X_i‖, or the mean square root of X_i, is over so many times the others' median.

The second is how one is loud in a layer that it leaves alone: what it sees there outweighs what the others see.
"""
HARM: Final = 0.1
"""How much a loud concept may raise what is left undone for the others, as a share of it without that concept."""
HALVINGS: Final = 40


def guarded(problem: LayerProblem, solver: Callable[[LayerProblem], Tensor]) -> tuple[LayerProblem, dict[int, float]]:
    """The problem with loud concepts turned down, and the weight that each of them was left.

    A loud change is first scaled to the loudest that passes. The weights of all loud ones are then halved until
    together they harm the others by no more than HARM; where no weight is low enough, they are left out: weight 0.
    """
    wants = _excess([math.sqrt(energy) for energy in problem.energies()])
    sees = _excess([_input_size(problem.look(k)) for k in range(len(problem.changes))])
    loud = [number for number, times in enumerate(zip(wants, sees, strict=True)) if max(times) > LOUD]
    for number in loud:
        if wants[number] > LOUD:
            problem = _scaled(problem, number, LOUD / wants[number])
    if loud:
        problem = _harmless(problem, loud, solver)
    return problem, {number: problem.weights[number] for number in loud}


def undone_of_others(problem: LayerProblem, number: int, change: Tensor) -> float:
    """What a change leaves undone of what all concepts but one want: Σ w_k ‖(ΔW_k − change) X_k‖²."""
    return _undone(problem, [k for k in range(len(problem.changes)) if k != number], change)


def _undone(problem: LayerProblem, numbers: Sequence[int], change: Tensor) -> float:
    """What a change leaves undone of what some concepts want."""
    left = problem.residuals(change)
    return sum(problem.weights[k] * left[k][0] for k in numbers)


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


def _excess(sizes: Sequence[float]) -> list[float]:
    """Each size over the median of the others that are not 0; 0 where there are none."""
    found = []
    for number, own in enumerate(sizes):
        others = [other for k, other in enumerate(sizes) if k != number and other > 0]
        found.append(own / median(others) if others else 0.0)
    return found


def _input_size(seen: Seen) -> float:
    """Root mean square of the inputs as the fused layer gets them."""
    moments = seen.moments if seen.drifted is None else seen.drifted
    return math.sqrt(float(moments.diagonal().sum()) / seen.rows) if seen.rows else 0.0


def _scaled(problem: LayerProblem, number: int, factor: float) -> LayerProblem:
    changes = [one.scaled(factor) if one and k == number else one for k, one in enumerate(problem.changes)]
    return replace(problem, changes=changes)
