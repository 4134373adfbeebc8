"""Intervals, means over slices, and what the judge makes of true pictures."""

from __future__ import annotations

import base64
import math
from random import Random
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from mixofshow.bases.emojiland.concepts import SUBJECTS, concept_pictures
from mixofshow.bases.emojiland.judge import image_features, text_features
from mixofshow.bases.emojiland.world import SIZE, WIDE, compose, places
from mixofshow.evaluation import charts
from mixofshow.evaluation.charts import matrix_chart, value_chart
from mixofshow.evaluation.metrics import interval
from mixofshow.evaluation.requests import BaseSource, DrawnBy, ImageRequest, PromptRequest, WideRequest, columns
from mixofshow.evaluation.results import Judge, alignments, confusions, per_seed, region_hits, slices
from mixofshow.evaluation.suite import make_suite, tell_of_shared
from mixofshow.sampling.settings import Composition

THREE = ("clown", "steamtrain", "robot")


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
    return PromptRequest(category, "", ImageRequest(DrawnBy(BaseSource(""), ""), Composition(prompt="")))


def test_means_are_over_seeds_last_and_every_concept_counts_the_same():
    suite = make_suite({"concepts": ["clown", "volcano"], "methods": ["p-plus"]})
    arm = {"clown": (_asked("context"), _asked("context"), _asked("style")), "volcano": (_asked("context"),)}
    over = slices(suite.concepts, arm)
    values = {"clown": torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, 9.0]]), "volcano": torch.tensor([[10.0, 20.0]])}
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
    request = ImageRequest(DrawnBy(BaseSource(""), name), Composition(prompt=name, num=len(images)))
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
    one = WideRequest(order, columns(3, WIDE, SIZE), (_kept(tmp_path, "wide", images),))
    hits = region_hits([one], Judge(image_features, text_features, tmp_path, references))
    right = [float(hits[name].mean()) for name in THREE]
    assert hits["clown"].shape == (1, len(images))
    assert right[1] >= 0.8  # the middle one stands where it should in either order
    assert min(right) >= 0.8 if order == THREE else max(right[0], right[2]) <= 0.2


def test_true_pictures_are_not_confused_and_swapped_ones_are(tmp_path, references):
    made = {name: _kept(tmp_path, name, [one.image for one in concept_pictures(name, 8, seed=7)]) for name in THREE}
    arm = {name: (PromptRequest("context", "", made[name]),) for name in THREE}
    judge = Judge(image_features, text_features, tmp_path, references)
    assert float(confusions(arm, judge).diagonal().min()) >= 0.8
    swapped = {**arm, "clown": arm["robot"], "robot": arm["clown"]}
    found = confusions(swapped, judge)
    assert float(found[0, 2]) >= 0.8 and float(found[2, 0]) >= 0.8


def test_pictures_with_other_things_in_them_do_not_count_as_confused(tmp_path, references):
    clowns = _kept(tmp_path, "clowns", [one.image for one in concept_pictures("clown", 4, seed=7)])
    trains = _kept(tmp_path, "trains", [one.image for one in concept_pictures("steamtrain", 4, seed=7)])
    arm = {"clown": (PromptRequest("context", "", clowns), PromptRequest("interaction", "", trains))}
    assert confusions(arm, Judge(image_features, text_features, tmp_path, references))[0].tolist() == [1, 0, 0]


def test_pictures_that_are_not_held_out_are_said(caplog):
    red, blue, green = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green"))
    tell_of_shared({"a": [red], "b": [blue]}, {"a": [green]})
    assert not caplog.text
    tell_of_shared({"a": [red, blue], "b": [blue.copy()]}, {"a": [red, green]})
    assert [one.getMessage() for one in caplog.records] == [
        "<a>: 1 of 2 held-out pictures are among the pictures that <a> is tuned on",
        "<a>: 1 of 2 held-out pictures are among those of <b>",
        "<b>: 1 of 1 held-out pictures are among those of <a>",
    ]


def test_boxes_stand_side_by_side_and_are_the_demos():
    assert columns(3, 160, 64) == ((2, 6, 54, 62), (54, 6, 106, 62), (106, 6, 158, 62))
    edges = [edge for box in columns(5, 1280, 512) for edge in (box[0], box[2])]
    assert edges == sorted(edges) and edges[0] > 0 and edges[-1] < 1280


def _texts(chart):
    svg = base64.b64decode(chart.removeprefix("data:image/svg+xml;base64,"))
    return [text.text.strip() for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


ODD = ["_a", "<b>", "$c", "字"]


def test_charts_say_their_values_and_any_name_and_are_the_same_each_time():
    series = {"$single": [(0.8, 0.75, 0.85)] * 4, "_fused": [(0.6, 0.6, 0.6)] * 4}
    chart = value_chart(ODD, series, line=0.1)
    assert chart == value_chart(ODD, series, line=0.1)
    assert {*ODD, *series, "0.800", "0.600"} <= {*_texts(chart)}
    several = {name: [(0.0, -0.1, 0.1), (-0.1, -0.1, -0.1)] for name in ODD}
    lines = value_chart(["one", "two"], several, joined=True, line=0.0)
    assert {*ODD, "one", "two"} <= {*_texts(lines)}


def test_a_matrix_says_all_shares_but_those_of_nothing():
    texts = _texts(matrix_chart(["a", "b"], [[1.0, 0.0], [0.5, 0.5]]))
    assert texts.count("1.00") == 1 and texts.count("0.50") == 2 and "0.00" not in texts
    assert texts.count("a") == texts.count("b") == 2


def test_a_report_does_without_matplotlib_and_says_so(monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    assert not charts.can_draw()
