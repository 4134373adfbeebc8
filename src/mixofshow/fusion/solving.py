"""Solving layers one after another, and reporting how well each concept is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from mixofshow.concepts.concept import Concept
from mixofshow.fusion.guard import guarded
from mixofshow.fusion.methods import METHODS, average, method_settings
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.recording import Stage
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.statistics import Seen, input_of
from mixofshow.fusion.store import Recording

Solver = Callable[[LayerProblem], Tensor]
STAGES: Final[tuple[Stage, ...]] = ("text", "keys-and-values", "picture")


@dataclass(frozen=True)
class LayerReport:
    """How well one layer was fused: the objective of the base weight (no change), of the fused one, of the average.

    `residuals` has for each concept what is left of the change that it wants, as a share in norm: 0 is perfect, 1 as
    if it were not there. `clipped` names the concepts that the guard turned down, with the weight they were left.
    """

    rows: int
    unchanged: float
    fused: float
    average: float
    residuals: Mapping[str, float]
    clipped: Mapping[str, float]

    @property
    def residual(self) -> float:
        """The same over all concepts."""
        return math.sqrt(self.fused / self.unchanged) if self.unchanged > 0 else 0.0


def solver_for(settings: FusionSettings, stage: Stage) -> Solver:
    """The method with its settings for a stage. Raises SettingsError for unknown ones."""
    options: dict[str, Any] = {}
    for key, value in sorted(settings.options.items(), key=lambda item: "." in item[0]):
        of, dot, name = key.rpartition(".")
        if dot and of not in STAGES:
            method_settings(settings.method, {key: value})  # names the nearest setting
        if not dot or of == stage:
            options[name] = value
    chosen = method_settings(settings.method, options)
    return lambda problem: METHODS[settings.method](problem, **chosen)


def problem_of(
    name: str,
    base: Tensor,
    concepts: Sequence[Concept],
    recordings: Sequence[Recording],
    settings: FusionSettings,
) -> LayerProblem:
    """The problem of one layer, (out, in), with what was recorded of each concept and, behind them, of the base."""
    source = input_of(name)
    problem = LayerProblem(
        base,
        [concept.deltas.get(name) for concept in concepts],
        lambda number: recordings[number].look(source, base.device),
        [1.0] * len(concepts),
    )
    problem = problem.weighed(_weights(problem, concepts, settings))
    for prior in recordings[len(concepts) :]:
        problem = _with_prior(problem, prior.look(source, base.device), settings.prior)
    return problem


def _weights(problem: LayerProblem, concepts: Sequence[Concept], settings: FusionSettings) -> list[float]:
    """The concepts' weights in this layer, 1 on average."""
    if settings.weights == "equal":
        return [1.0] * len(concepts)
    if settings.weights == "energy":
        energies = [problem.residual(number, problem.zero())[1] for number in range(len(concepts))]
        found = [1 / energy if energy > 0 else 0.0 for energy in energies]
    else:
        found = [settings.weights.get(concept.info.name, 1.0) for concept in concepts]
    scale = len(found) / total if (total := sum(found)) > 0 else 0.0
    return [scale * weight for weight in found] if scale else [1.0] * len(found)


def _with_prior(problem: LayerProblem, prior: Seen, share: float) -> LayerProblem:
    """The problem with the base's own inputs, which are given `share` of the energy that a concept's inputs have."""
    of_concepts = float(problem.sums.moments.diagonal().sum()) / len(problem.changes)
    of_prior = float(prior.moments.diagonal().sum())
    return replace(problem, prior=prior, prior_weight=share * of_concepts / of_prior if of_prior > 0 else 0.0)


def solve(problem: LayerProblem, names: Sequence[str], solver: Solver, *, guard: bool) -> tuple[Tensor, LayerReport]:
    """The fused weight (out, in) of one layer in the base's precision, and how good it is for each named concept."""
    asked, clipped = problem, {}
    if guard:
        problem, turned_down = guarded(problem, solver)
        clipped = {names[number]: weight for number, weight in turned_down.items()}
    change = solver(problem)
    fused = (problem.base.double() + change).to(problem.base.dtype)
    met = fused.double() - problem.base.double()
    residuals = {}
    for number, name in enumerate(names):
        left, wanted = asked.residual(number, met)
        residuals[name] = math.sqrt(left / wanted) if wanted > 0 else 0.0
    sums = problem.sums
    report = LayerReport(
        sums.rows, sums.energy, sums.objective(met), sums.objective(average(problem)), residuals, clipped
    )
    return fused, report
