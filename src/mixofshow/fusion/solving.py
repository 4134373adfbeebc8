"""Solving layers one after another, and reporting how well each concept is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from torch import Tensor

from mixofshow.concepts.concept import Concept
from mixofshow.errors import SettingsError
from mixofshow.fusion.guard import guarded, undone_of_others
from mixofshow.fusion.methods import KEEPS_INPUTS, METHODS, STAGE_DEFAULTS, mean, method_settings
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.recording import Stage
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.statistics import Seen

Solver = Callable[[LayerProblem], Tensor]
STAGES: Final[tuple[Stage, ...]] = ("text", "keys-and-values", "picture")


@dataclass(frozen=True)
class Kept:
    """How much of one concept is kept in one layer: squared norms of what is `left` undone, and of all that it `wanted`.

    With leave-one-out, also what is left undone of all other concepts with this one, and had it not been there.
    """

    left: float
    wanted: float
    others: float = 0.0
    others_without: float = 0.0


@dataclass(frozen=True)
class LayerReport:
    """How well one layer was fused: the objective of the base weight (no change), of the fused one, of the average.

    `clipped` names the concepts that the guard turned down, with the weight they were left.
    """

    rows: int
    unchanged: float
    fused: float
    average: float
    concepts: Mapping[str, Kept]
    clipped: Mapping[str, float]

    @property
    def residual(self) -> float:
        """What is left of the change that the concepts want, as a share in norm: 0 is perfect, 1 as if unfused."""
        return share(self.fused, self.unchanged)

    @property
    def residuals(self) -> dict[str, float]:
        """The same for each concept."""
        return {name: share(kept.left, kept.wanted) for name, kept in self.concepts.items()}


def share(left: float, wanted: float) -> float:
    """The root of left / wanted; 0 where nothing was wanted."""
    return math.sqrt(left / wanted) if wanted > 0 else 0.0


def total(reports: Iterable[LayerReport], name: str) -> Kept:
    """One concept over several layers."""
    found = [report.concepts[name] for report in reports]
    return Kept(*(sum(getattr(kept, field.name) for kept in found) for field in fields(Kept)))


@dataclass(frozen=True)
class TurnedDown:
    """What the guard did to one concept: in how many layers it was turned down, and the least weight it was left."""

    layers: int
    weight: float


def turned_down(reports: Iterable[LayerReport]) -> dict[str, TurnedDown]:
    """The concepts that the guard turned down, over all layers."""
    found: dict[str, TurnedDown] = {}
    for report in reports:
        for name, weight in report.clipped.items():
            before = found.get(name, TurnedDown(0, math.inf))
            found[name] = TurnedDown(before.layers + 1, min(before.weight, weight))
    return found


def solver_for(settings: FusionSettings, stage: Stage) -> Solver:
    """The method with its settings for a stage. Raises SettingsError for unknown ones.

    A stage's own settings stand above those for all stages, and what is given above what is usual for the method.
    """
    options: dict[str, Any] = dict(STAGE_DEFAULTS.get(settings.method, {}).get(stage, {}))
    for key, value in sorted(settings.options.items(), key=lambda item: "." in item[0]):
        of, dot, name = key.rpartition(".")
        if dot and of not in STAGES:
            method_settings(settings.method, {key: value})  # names the nearest setting
        if not dot or of == stage:
            options[name] = value
    chosen = method_settings(settings.method, options)
    return lambda problem: METHODS[settings.method](problem, **chosen)


def check_method(settings: FusionSettings) -> None:
    """Raise SettingsError for an unknown method, or settings that do not go together, before anything is recorded."""
    if settings.method in KEEPS_INPUTS and settings.passes:
        raise SettingsError(f"refine: method '{settings.method}' has no use for drifted inputs; set refine to 0")
    if settings.guard and settings.refit:
        raise SettingsError("refit: would teach the model what the guard turns down; give one of the two")
    for stage in STAGES:
        solver_for(settings, stage)


def problem_of(
    name: str, base: Tensor, concepts: Sequence[Concept], look: Callable[[int], Seen], settings: FusionSettings
) -> LayerProblem:
    """The problem of one layer, (out, in); `look(i)` is what was recorded of concept i and, behind them, of the base."""
    problem = LayerProblem(base, [concept.deltas.get(name) for concept in concepts], look, [1.0] * len(concepts))
    problem = problem.weighed(_weights(problem, concepts, settings))
    return _with_prior(problem, look(len(concepts)), settings.prior) if settings.prior else problem


def _weights(problem: LayerProblem, concepts: Sequence[Concept], settings: FusionSettings) -> list[float]:
    """The concepts' weights in this layer, 1 on average."""
    if settings.counting == "equal":
        return [1.0] * len(concepts)
    if settings.counting == "energy":
        energies = problem.energies()
        known = [1 / energy for energy in energies if energy > 0] or [1.0]
        # One that changes nothing here wants it left alone, as much as the others want their change.
        found = [1 / energy if energy > 0 else sum(known) / len(known) for energy in energies]
    else:
        found = [settings.counting.get(concept.info.name, 1.0) for concept in concepts]
    return [weight * len(found) / sum(found) for weight in found]


def _with_prior(problem: LayerProblem, prior: Seen, share: float) -> LayerProblem:
    """The problem with the base's own inputs, which are given `share` of the energy that a concept's inputs have."""
    of_concepts = float(problem.sums.moments.diagonal().sum()) / len(problem.changes)
    of_prior = float(prior.moments.diagonal().sum())
    return replace(problem, prior=prior, prior_weight=share * of_concepts / of_prior if of_prior > 0 else 0.0)


def solve(
    problem: LayerProblem, names: Sequence[str], solver: Solver, settings: FusionSettings
) -> tuple[Tensor, LayerReport]:
    """The fused weight (out, in) of one layer in the base's precision, and how good it is for each named concept."""
    asked, clipped = problem, {}
    if settings.guard or settings.refuse_loud:
        problem, left = guarded(problem, solver)
        clipped = {names[number]: weight for number, weight in left.items()}
    change = solver(problem)
    fused = (problem.base.double() + change).to(problem.base.dtype)
    met = fused.double() - problem.base.double()
    kept = {name: Kept(*one) for name, one in zip(names, asked.residuals(met), strict=True)}
    if settings.leave_one_out:
        kept = {name: _beside(one, problem, number, met, solver) for number, (name, one) in enumerate(kept.items())}
    sums = problem.sums
    report = LayerReport(sums.rows, sums.energy, sums.objective(met), sums.objective(mean(problem)), kept, clipped)
    return fused, report


def _beside(kept: Kept, problem: LayerProblem, number: int, met: Tensor, solver: Solver) -> Kept:
    """With what the other concepts lose through this one."""
    return replace(
        kept,
        others=undone_of_others(problem, number, met),
        others_without=undone_of_others(problem, number, solver(problem.without(number))),
    )
