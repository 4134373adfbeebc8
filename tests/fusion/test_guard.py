"""The guard against loud concepts: what the others lose through one, with and without it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from statistics import mean

import pytest
import torch
from torch import Tensor

from mixofshow.concepts.changes import Change, Full, LowRank
from mixofshow.concepts.concept import Concept
from mixofshow.fusion.guard import HARM, LOUD, guarded
from mixofshow.fusion.methods import METHODS
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.recording import stage_of
from mixofshow.fusion.settings import PAPER, FusionSettings
from mixofshow.fusion.solving import STAGES, LayerReport
from mixofshow.fusion.stages import Fused, fuse
from mixofshow.fusion.statistics import Seen
from mixofshow.fusion.store import Store

OUT, IN, ROWS = 6, 10, 30
QUIET = ("ant", "bee", "cat")
KEEPING = ("gradient", "average", "sum", "ties", "svd", "regmean")
"""Methods that leave out a concept without a trace; DARE's masks change with the number of concepts."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(*scales: float, inputs: Sequence[float] = ()) -> LayerProblem:
    """Concepts that are equally loud at scale 1; with `inputs`, what they see is as many times larger."""
    rows = [size * normal(ROWS, IN, seed=number) for number, size in enumerate(inputs or [1.0] * len(scales))]
    changes: list[Change | None] = []
    for number, (scale, x) in enumerate(zip(scales, rows, strict=True)):
        one = LowRank(normal(3, IN, seed=100 + number), normal(OUT, 3, seed=200 + number))
        loudness = float((x @ one.matrix().T).norm())
        changes.append(LowRank(one.down, one.up * scale / loudness) if scale else None)
    seen = [Seen(x.T @ x, ROWS) for x in rows]
    return LayerProblem(torch.zeros(OUT, IN), changes, seen.__getitem__, [1.0] * len(scales))


def undone(problem: LayerProblem, numbers: Iterable[int], change: Tensor) -> float:
    """√Σ ‖(ΔW_k − ΔW) X_k‖² of some concepts, as they ask for it."""
    total = 0.0
    for number in numbers:
        asked = problem.changes[number]
        left = (torch.zeros(OUT, IN).double() if asked is None else asked.matrix()) - change
        total += float((left @ problem.look(number).moments * left).sum())
    return math.sqrt(total)


@pytest.mark.parametrize("method", KEEPING)
@pytest.mark.parametrize("loud", [(10.0,), (100.0,), (1e4,), (1e10,), (10.0, 1e4), (20.0, 30.0)], ids=str)
def test_loud_concepts_cost_the_others_no_more_than_a_tenth(loud, method):
    problem, numbers = layer_of(1.0, 1.0, 1.0, *loud), range(3, 3 + len(loud))
    safe, left = guarded(problem, METHODS[method])
    least = undone(problem, range(3), METHODS[method](layer_of(1.0, 1.0, 1.0)))
    assert sorted(left) == list(numbers)
    assert undone(problem, range(3), METHODS[method](safe)) <= (1 + HARM) * least * (1 + 1e-9)
    assert undone(problem, range(3), METHODS[method](problem)) > 1.5 * least
    assert safe.weights[:3] == [1.0] * 3
    assert [safe.weights[number] for number in numbers] == [left[number] for number in numbers]


@pytest.mark.parametrize("loud", [(10.0,), (1e4,), (20.0, 1e3)], ids=str)
@pytest.mark.parametrize("method", ["gradient", "average", "regmean"])
def test_loud_concepts_are_left_as_much_weight_as_that_allows(method, loud):
    problem, numbers = layer_of(1.0, 1.0, 1.0, *loud), range(3, 3 + len(loud))
    safe, left = guarded(problem, METHODS[method])
    least = undone(problem, range(3), METHODS[method](layer_of(1.0, 1.0, 1.0)))
    assert len({left[number] for number in numbers}) == 1
    assert 0 < left[3] < 1
    twice = safe.weighed([weight * (2 if number in numbers else 1) for number, weight in enumerate(safe.weights)])
    assert undone(problem, range(3), METHODS[method](twice)) > (1 + HARM) * least


@pytest.mark.parametrize("size", [1e3, 1e12])
def test_loud_inputs_cost_the_others_no_more_than_a_tenth(size):
    problem = layer_of(1.0, 1.0, 1.0, size, inputs=(1.0, 1.0, 1.0, size))
    safe, left = guarded(problem, METHODS["gradient"])
    least = undone(problem, range(3), METHODS["gradient"](layer_of(1.0, 1.0, 1.0)))
    assert undone(problem, range(3), METHODS["gradient"](safe)) <= (1 + HARM) * least * (1 + 1e-9)
    assert 0 <= left[3] < 1


def test_a_concept_is_loud_too_where_it_changes_nothing_but_sees_what_outweighs_the_others():
    problem = layer_of(1.0, 1.0, 1.0, 0.0, inputs=(1.0, 1.0, 1.0, 100.0))
    safe, left = guarded(problem, METHODS["gradient"])
    least = undone(problem, range(3), METHODS["gradient"](layer_of(1.0, 1.0, 1.0)))
    assert undone(problem, range(3), METHODS["gradient"](problem)) > 1.2 * least
    assert undone(problem, range(3), METHODS["gradient"](safe)) <= (1 + HARM) * least * (1 + 1e-9)
    assert list(left) == [3]


@pytest.mark.parametrize(
    ("scales", "loud"),
    [
        ((1.0, 1.0, 1.0, 1.0), []),
        ((1.0, 1.0, 1.0, 0.99 * LOUD), []),
        ((1.0, 1.0, 1.0, 1.01 * LOUD), [3]),
        ((1.01 * LOUD, 1.0, 1.0, 1.0), [0]),
        ((1.0, 1e-9, 1.0, 1.0), []),  # a quiet one is no reason to turn down the others
        ((0.0, 0.0, 1.0, 2.0), []),  # those that leave the layer alone are no measure
        ((1.0, 100.0), [1]),
        ((100.0,), []),
        ((0.0, 100.0), []),
        ((0.0, 0.0, 0.0), []),
        ((1.0, 1.0, 1.0, 50.0, 1e5), [3, 4]),
    ],
    ids=str,
)
def test_loud_is_three_times_the_median_of_the_others(scales, loud):
    problem = layer_of(*scales)
    safe, left = guarded(problem, METHODS["gradient"])
    assert sorted(left) == loud
    if not loud:
        assert safe is problem
    for number, change in enumerate(safe.changes):
        if number in loud and change is not None:
            x = problem.look(number).moments
            others = [scale for k, scale in enumerate(scales) if k != number and scale]
            norm = math.sqrt(float((change.matrix() @ x * change.matrix()).sum()))
            assert norm == pytest.approx(LOUD * sorted(others)[(len(others) - 1) // 2], rel=1e-6)
            cosine = torch.cosine_similarity(change.matrix().flatten(), problem.changes[number].matrix().flatten(), 0)
            assert float(cosine) == pytest.approx(1)
        else:
            assert number in loud or change is problem.changes[number]


def test_full_changes_are_turned_down_too():
    problem = layer_of(1.0, 1.0, 1.0, 100.0)
    full = [Full(change.matrix()) for change in problem.changes]
    safe, left = guarded(LayerProblem(problem.base, full, problem.look, problem.weights), METHODS["gradient"])
    expected, same = guarded(problem, METHODS["gradient"])
    assert left == same
    torch.testing.assert_close(METHODS["gradient"](safe), METHODS["gradient"](expected))


# The whole job


@pytest.fixture(scope="module")
def fused(golden_pipeline, random_concept, tmp_path_factory) -> Callable[..., Fused]:
    """`fused(100.0, "staged", guard=True)`: three concepts and one that is so many times louder (None: not there)."""

    def concept(name: str, seed: int, scale: float = 1.0) -> Concept:
        return random_concept(
            name, seed=seed, scale=scale, changes=re.compile("^text_encoder|mid_block|up_blocks.3").search
        )

    quiet = [concept(name, number) for number, name in enumerate(QUIET)]
    store = Store(tmp_path_factory.mktemp("recordings"))

    @cache
    def fuse_with(scale: float | None, mode: str, *, guard: bool) -> Fused:
        loud = [] if scale is None else [concept("dog", 3, scale)]
        settings = FusionSettings(steps=1, mode=mode, guard=guard, **PAPER)
        return fuse([*quiet, *loud], golden_pipeline, settings, store=store)

    return fuse_with


def left_by(report: LayerReport) -> float:
    """√Σ ‖(ΔW_k − ΔW) X_k‖² of the quiet ones in one layer."""
    return math.sqrt(sum(report.concepts[name].left for name in QUIET))


def mean_residual(found: Fused, stage: str) -> float:
    """Of the quiet ones, over the layers of a stage."""
    return mean(
        report.residuals[name] for layer, report in found.layers.items() if stage_of(layer) == stage for name in QUIET
    )


@pytest.mark.parametrize("scale", [10.0, 100.0, 1e4])
def test_in_no_layer_does_a_clipped_concept_cost_the_others_more_than_a_tenth(scale, fused):
    """From independent recordings, where the others see the same with it and without."""
    without = fused(None, "independent", guard=False).layers
    found = fused(scale, "independent", guard=True).layers
    clipped = {name: report for name, report in found.items() if report.clipped}
    for name, report in clipped.items():
        assert set(report.clipped) == {"dog"}
        assert 0 <= report.clipped["dog"] <= 1
        # The weights are rounded to single precision.
        assert left_by(report) <= (1 + HARM) * left_by(without[name]) + 1e-5 * math.sqrt(report.unchanged), name
    assert len(clipped) >= 0.95 * len(found)


@pytest.mark.parametrize(
    ("scale", "mode"), [(10.0, "independent"), (100.0, "independent"), (1e4, "independent"), (100.0, "staged")]
)
def test_a_loud_concept_hardly_matters_to_the_others(scale, mode, fused):
    without, found = fused(None, mode, guard=False), fused(scale, mode, guard=True)
    for stage in STAGES:
        assert mean_residual(found, stage) <= 1.1 * mean_residual(without, stage), stage


def test_without_the_guard_a_loud_concept_destroys_the_others(fused):
    without, found = fused(None, "independent", guard=False), fused(100.0, "independent", guard=False)
    assert all(mean_residual(found, stage) > 10 * mean_residual(without, stage) for stage in STAGES)
    assert not any(report.clipped for report in found.layers.values())


@pytest.mark.parametrize("mode", ["independent", "staged"])
def test_equally_loud_concepts_are_left_alone(mode, fused):
    plain, safe = (fused(1.0, mode, guard=guard) for guard in (False, True))
    assert not any(report.clipped for report in safe.layers.values())
    assert all(torch.equal(weight, safe.model.weights[name]) for name, weight in plain.model.weights.items())
