"""Solving layers one after another, and reporting how well each concept is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from torch import Tensor

from mixofshow.concepts.concept import Concept
from mixofshow.errors import BadInputError, nearest, shown
from mixofshow.fusion.methods import METHODS, NEEDS_STATISTICS, STAGE_DEFAULTS, mean, method_settings
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.recording import STAGES, Stage, stage_of
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.statistics import LayerStatistics

Solver = Callable[[LayerProblem], Tensor]
QUIET: Final = 0.25
"""Of a layer's output in the base: those that change less of it count, by energy, as if they changed so much."""


@dataclass(frozen=True)
class ConceptResidual:
    """What a layer lost of one concept: squared norms of the residual, and of the target that it is a part of.

    With leave-one-out, also the residual of all other concepts with this one, and had it not been there.
    """

    residual_sq: float
    target_sq: float
    others: float = 0.0
    others_without: float = 0.0


@dataclass(frozen=True)
class LayerReport:
    """How well one layer was fused: the objective of the base weight (no change), of the fused one, of the average.

    `clipped` names the concepts that the guard turned down here, with what it left of their change.
    """

    rows: int
    unchanged: float
    fused: float
    average: float
    concepts: Mapping[str, ConceptResidual]
    clipped: Mapping[str, float] = field(default_factory=dict)

    @property
    def residual(self) -> float:
        """What is left of the change that the concepts want, as a share in norm: 0 is perfect, 1 as if unfused."""
        return share(self.fused, self.unchanged)

    @property
    def residuals(self) -> dict[str, float]:
        """The same for each concept."""
        return {name: share(kept.residual_sq, kept.target_sq) for name, kept in self.concepts.items()}


def share(residual_sq: float, target_sq: float) -> float:
    """The residual as a share of the target, in norm; 0 where there was no target."""
    return math.sqrt(residual_sq / target_sq) if target_sq > 0 else 0.0


def total(reports: Iterable[LayerReport], name: str) -> ConceptResidual:
    """One concept over several layers."""
    found = [report.concepts[name] for report in reports]
    return ConceptResidual(*(sum(getattr(kept, one.name) for kept in found) for one in fields(ConceptResidual)))


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
    """Raise SettingsError for an unknown method or settings that it does not have, before anything is recorded."""
    for stage in STAGES:
        solver_for(settings, stage)


def looks_at_inputs(settings: FusionSettings) -> bool:
    """Whether anything must be recorded: for the method, for weights by energy, or for the report."""
    return (
        settings.method in NEEDS_STATISTICS
        or settings.counting == "energy"
        or settings.measure
        or settings.leave_one_out
    )


def problem_of(
    name: str,
    base: Tensor,
    concepts: Sequence[Concept],
    statistics: Callable[[int], LayerStatistics],
    settings: FusionSettings,
) -> LayerProblem:
    """The problem of one layer, (out, in); `statistics(i)` are concept i's, and after the last one's the base's."""
    count = len(concepts)
    problem = LayerProblem(base, [concept.deltas.get(name) for concept in concepts], statistics, [1.0] * count)
    if settings.counting == "equal":
        weights = [1.0] * count
    elif settings.counting == "energy":
        weights = energy_weights(problem)
    else:
        weights = [weight_of(settings.counting, concept.info.name, stage_of(name)) for concept in concepts]
    problem = replace(problem, weights=[weight * count / sum(weights) for weight in weights])
    if not settings.prior:
        return problem
    # In units of the energy that a concept's inputs have.
    prior = statistics(count)
    of_concepts, of_prior = (float(moments.diagonal().sum()) for moments in (problem.sums.moments, prior.moments))
    prior_weight = settings.prior * (of_concepts / count) / of_prior if of_prior > 0 else 0.0
    return replace(problem, prior=prior, prior_weight=prior_weight)


def weight_of(table: Mapping[str, float], name: str, stage: Stage) -> float:
    """What a concept counts in a stage's layers, where `table` says it for these (`name.stage`), or for all (`name`)."""
    return table.get(f"{name}.{stage}", table.get(name, 1.0))


def check_weights(settings: FusionSettings, names: Iterable[str]) -> None:
    """Raise BadInputError unless weights by name are of concepts of these names, or of one of them in a stage."""
    table = settings.weights
    if not isinstance(table, Mapping):
        return  # without looking at the names, which may be in files
    names = list(names)
    if unknown := sorted({key.partition(".")[0] for key in table} - set(names)):
        hint = nearest(unknown[0], names) or f"; there are {shown(', '.join(names))}"
        raise BadInputError(f"weights: no concept is called {shown(', '.join(unknown))}{hint}")
    for key in table:
        name, dot, stage = key.partition(".")
        if dot and stage not in STAGES:
            known = ", ".join(f"{name}.{one}" for one in STAGES)
            raise BadInputError(f"weights: expected {name} or one of {known}, found {shown(key)}")


def energy_weights(problem: LayerProblem) -> list[float]:
    """1 / max(‖ΔW_i X_i‖², QUIET² ‖W0 X_i‖²) of each concept.

    The larger a concept's target, the less it counts, so that none drowns the others; one of a small target counts as if
    it were QUIET: no more than its share. A weight depends on nobody else.
    """
    found = [max(own, QUIET**2 * output) for own, output in problem.energies_and_outputs()]
    most = max(found)  # of one that sees nothing; it says nothing, whatever its weight
    return [1 / (one or most or 1.0) for one in found]


def solve(problem: LayerProblem, solver: Solver) -> tuple[Tensor, Tensor]:
    """The fused weight (out, in) of one layer in the base's precision, and the change that it then is, in double."""
    fused = (problem.base.double() + solver(problem)).to(problem.base.dtype)
    return fused, fused.double() - problem.base.double()


def report_of(asked: LayerProblem, problem: LayerProblem, change: Tensor, names: Sequence[str]) -> LayerReport:
    """The report on a change: `asked` has all concepts, which are named, and `problem` those that the layer is solved for."""
    sums = problem.sums
    kept = {name: ConceptResidual(*one) for name, one in zip(names, asked.residuals(change), strict=True)}
    return LayerReport(sums.rows, sums.energy, sums.objective(change), sums.objective(mean(problem)), kept)


def beside(
    report: LayerReport, problem: LayerProblem, change: Tensor, names: Sequence[str], solver: Solver
) -> LayerReport:
    """The report with what the others lose through each of the problem's concepts, which are named."""
    kept = dict(report.concepts)
    for number, name in enumerate(names):
        others = problem.residual_of_others(number, change)
        without = problem.residual_of_others(number, solver(problem.without(number))) if len(names) > 1 else 0.0
        kept[name] = replace(kept[name], others=others, others_without=without)
    return replace(report, concepts=kept)
