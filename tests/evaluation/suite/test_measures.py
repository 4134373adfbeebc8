"""Intervals, means over slices, and what the judge makes of true pictures."""

from __future__ import annotations

import math
from random import Random
from xml.etree import ElementTree

import pytest
import torch

from mixofshow.bases.emojiland.concepts import SUBJECTS, concept_pictures
from mixofshow.bases.emojiland.judge import image_features
from mixofshow.bases.emojiland.world import SIZE, WIDE, compose, places
from mixofshow.evaluation.charts import Point, bar_chart, line_chart, matrix_chart
from mixofshow.evaluation.suite.intervals import interval
from mixofshow.evaluation.suite.measure import Eye, confusions, per_seed, region_hits, slices
from mixofshow.evaluation.suite.plan import Asked, Together, columns
from mixofshow.evaluation.suite.results import alignments
from mixofshow.evaluation.suite.settings import make_suite
from mixofshow.evaluation.suite.work import Model, Request
from mixofshow.sampling.settings import Composition

THREE = ("reddog", "greenhouse", "robot")


def test_an_interval_holds_the_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(400, 40, generator=generator, dtype=torch.float64)
    held = [low <= 0 <= high for low, high in map(interval, draws)]
    assert 0.91 <= sum(held) / len(held) <= 0.98


def test_an_interval_is_as_wide_as_theory_has_it():
    values = torch.randn(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low, high = interval(values)
    expected = 2 * 1.96 * float(values.std()) / math.sqrt(len(values))
    assert high - low == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25, 0.25]])
def test_what_does_not_vary_has_no_width(values):
    assert interval(torch.tensor(values)) == (values[0], values[0])


def _asked(category):
    return Asked(category, "", Request(Model("", ""), Composition(prompt="")))


def test_means_are_over_seeds_last_and_every_concept_counts_the_same():
    suite = make_suite({"concepts": ["reddog", "volcano"], "methods": ["p-plus"]})
    arm = {"reddog": (_asked("context"), _asked("context"), _asked("style")), "volcano": (_asked("context"),)}
    over = slices(suite.concepts, arm)
    values = {"reddog": torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, 9.0]]), "volcano": torch.tensor([[10.0, 20.0]])}
    found = {name: per_seed(values, chosen).tolist() for name, chosen in over.items()}
    assert found == {
        "mean": [7.0, 12.5],
        "characters": [4.0, 5.0],
        "scenes": [10.0, 20.0],
        "context": [6.0, 11.5],
        "style": [8.0, 9.0],
    }


def test_the_change_is_measured_on_equal_seeds():
    # Seeds differ much, but every one of them changes by as much: so the change is certain.
    single = {"a": torch.tensor([[0.1, 0.9, 0.5, 0.3]])}
    fused = {"a": single["a"] - 0.25}
    found = alignments(single, fused, {"mean": {"a": torch.tensor([0])}})["mean"]
    assert found["change"] == pytest.approx(-0.25)
    assert found["intervals"]["change"] == pytest.approx([-0.25, -0.25])
    assert found["intervals"]["single"][1] - found["intervals"]["single"][0] > 0.3


@pytest.fixture(scope="module")
def references():
    return {name: image_features([one.image for one in concept_pictures(name, 12, seed=1)]) for name in THREE}


def _kept(folder, name, images):
    """Pictures as if they had been drawn for a request."""
    request = Request(Model("", name), Composition(prompt=name, num=len(images)))
    for image, path in zip(images, request.paths(folder), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return request


@pytest.mark.parametrize("order", [THREE, THREE[::-1]])
def test_regions_of_true_wide_pictures_are_recognized_and_those_in_other_places_are_not(tmp_path, references, order):
    random = Random(0)
    sprites = [(name, SUBJECTS[name].picture()) for name in THREE]
    scenes = ["in the forest", "on the beach", "in the city", "in the snow"] * 2
    images = [compose(sprites, scene, random, width=WIDE, laid=places(random, 3, width=WIDE)).image for scene in scenes]
    one = Together(order, columns(3, WIDE, SIZE), _kept(tmp_path, "wide", images))
    hits = region_hits([one], Eye(image_features, tmp_path), references)
    right = [float(hits[name].mean()) for name in THREE]
    assert hits["reddog"].shape == (1, len(images))
    assert right[1] >= 0.8  # the middle one stands where it should in either order
    assert min(right) >= 0.8 if order == THREE else max(right[0], right[2]) <= 0.2


def test_true_pictures_are_not_confused_and_swapped_ones_are(tmp_path, references):
    made = {name: _kept(tmp_path, name, [one.image for one in concept_pictures(name, 8, seed=7)]) for name in THREE}
    arm = {name: (Asked("context", "", made[name]),) for name in THREE}
    eye = Eye(image_features, tmp_path)
    assert float(confusions(arm, eye, references).diagonal().min()) >= 0.8
    swapped = {**arm, "reddog": arm["robot"], "robot": arm["reddog"]}
    found = confusions(swapped, eye, references)
    assert float(found[0, 2]) >= 0.8 and float(found[2, 0]) >= 0.8


def test_pictures_with_other_things_in_them_do_not_count_as_confused(tmp_path, references):
    dogs = _kept(tmp_path, "dogs", [one.image for one in concept_pictures("reddog", 4, seed=7)])
    houses = _kept(tmp_path, "houses", [one.image for one in concept_pictures("greenhouse", 4, seed=7)])
    arm = {"reddog": (Asked("context", "", dogs), Asked("interaction", "", houses))}
    assert confusions(arm, Eye(image_features, tmp_path), references)[0].tolist() == [1, 0, 0]


def test_boxes_stand_side_by_side_and_are_the_demos():
    assert columns(3, 160, 64) == ((2, 6, 54, 62), (54, 6, 106, 62), (106, 6, 158, 62))
    edges = [edge for box in columns(5, 1280, 512) for edge in (box[0], box[2])]
    assert edges == sorted(edges) and edges[0] > 0 and edges[-1] < 1280


def _shapes(svg, tag):
    return list(ElementTree.fromstring(svg).iter(tag))


def test_bars_are_as_high_as_their_values():
    series = {"single": [Point(0.8, 0.75, 0.85), Point(0.4)], "fused": [Point(0.6), Point(0.2)]}
    svg = bar_chart(["a", "<b>"], series, line=0.1)
    bars = [float(bar.get("height")) for bar in _shapes(svg, "rect") if bar.find("title") is not None]
    steps = [bars[0] - bars[2], bars[2] - bars[1], bars[1] - bars[3]]  # 0.8, 0.6, 0.4, 0.2
    assert steps[0] == pytest.approx(steps[1], abs=0.3) == pytest.approx(steps[2], abs=0.3)
    assert steps[0] > 10
    assert any("<b>, single: 0.400" in (title.text or "") for title in _shapes(svg, "title"))


def test_lines_go_through_their_values_and_the_matrix_is_darkest_where_it_is_largest():
    svg = line_chart(["one", "two"], {"a": [Point(0.0), Point(-0.1)]}, line=0.0)
    first, second = (float(dot.get("cy")) for dot in _shapes(svg, "circle"))
    level = [float(line.get("y1")) for line in _shapes(svg, "line") if line.get("stroke-dasharray")]
    assert level == [pytest.approx(first)] and second > first
    cells = [cell.get("fill") for cell in _shapes(matrix_chart(["a", "b"], [[1.0, 0.0], [0.5, 0.5]]), "rect")]
    assert cells[:2] == ["rgb(8,48,107)", "rgb(255,255,255)"] and cells[2] == cells[3]
