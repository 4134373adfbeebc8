"""Scores and the report page."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from mixofshow.errors import DatasetError, SettingsError
from mixofshow.evaluation import metrics
from mixofshow.evaluation.metrics import image_alignment
from mixofshow.evaluation.report import enlarged, templates
from mixofshow.evaluation.requests import BaseSource, DrawnBy, make_plan
from mixofshow.evaluation.scorers import references_of, scorer_for
from mixofshow.evaluation.suite import make_suite, suite_of_files


def _unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


@pytest.mark.parametrize(
    ("made", "references", "expected"),
    [
        (_unit([1, 0]), _unit([1, 0]), 1.0),
        (_unit([1, 0]), _unit([0, 1]), 0.0),
        (_unit([1, 0]), _unit([1, 0], [-1, 0]), 0.0),
        (_unit([1, 1]), _unit([1, 0], [0, 1]), 0.5**0.5),
    ],
)
def test_image_alignment_is_the_mean_cosine_of_all_pairs(made, references, expected):
    assert image_alignment(made, references) == pytest.approx(expected, abs=1e-6)


def test_the_first_reference_alone_is_what_the_published_script_compares_with():
    references = _unit([1, 0], [0, 1])
    assert metrics.reference_scores(_unit([1, 0], [0, 1]), references[:1]).tolist() == [1, 0]
    assert metrics.reference_scores(_unit([1, 0], [0, 1]), references).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (_unit([1, 0]), 1.0),
        (_unit([1, 0], [1, 0]), 1.0),
        (_unit([1, 0], [0, 1]), 0.0),
        (_unit([1, 0], [1, 0], [0, 1]), 1 / 3),
    ],
)
def test_references_are_compared_with_each_other_and_not_with_themselves(references, expected):
    assert metrics.self_alignment(references) == pytest.approx(expected, abs=1e-6)


def test_the_nearest_reference_decides_and_not_the_mean():
    # The second concept has the nearer picture, the first the nearer mean.
    first, second = _unit([1, 0.2], [1, 0.2]), _unit([1, 0], [-1, 0])
    assert metrics.nearest_concept(_unit([1, 0], [1, 0.2], [-1, 0.1]), [first, second]).tolist() == [1, 0, 1]


def test_interference_is_counted_in_shares_of_what_was_asked():
    found = metrics.interference(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 0]), 3)
    assert found.tolist() == [[0.75, 0.25, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (_unit([1, 0], [1, 0])[None], 0.0),
        (_unit([1, 0], [0, 1])[None], 1.0),
        (_unit([1, 0], [0, 1], [0, 1])[None], 2 / 3),
        (torch.stack([_unit([1, 0], [1, 0]), _unit([1, 0], [-1, 0])]), 1.0),
        (_unit([1, 0])[None], None),
    ],
)
def test_diversity_is_the_mean_distance_of_pairs_of_seeds(made, expected):
    assert metrics.diversity(made) == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_distances_to_training_and_drift():
    training = _unit([1, 0], [0, 1])
    assert metrics.distance_to_nearest(training, training) == pytest.approx(0, abs=1e-6)
    assert metrics.distance_to_nearest(_unit([1, 1], [1, 0]), training) == pytest.approx((1 - 0.5**0.5) / 2, abs=1e-6)
    assert metrics.drift(training, training.flip(0)) == pytest.approx(1)
    assert metrics.drift(training, training) == pytest.approx(0, abs=1e-6)


def test_text_alignment_is_clipscore():
    assert metrics.text_scores(_unit([1, 0], [1, 0]), _unit([1, 0], [-1, 0])).tolist() == [2.5, 0]


def test_each_model_is_asked_for_its_own_name_of_the_concept():
    suite = make_suite({"concepts": ["clown"], "methods": ["p-plus"], "prompts": {"subject": {"context": ["a {}"]}}})
    base, single, fused = (DrawnBy(BaseSource("emojiland"), name) for name in ("base", "single", "fused"))
    models = {"single": {"p-plus": {"clown": single}}, "words_only": {}, "fused": {"p-plus": fused}}
    plan = make_plan(suite, base, **models, side=64)
    arms = {"base": plan.bounds, "single": plan.single["p-plus"], "fused": plan.fused["p-plus"]}
    asked = {name: arm["clown"][0] for name, arm in arms.items()}
    assert {name: one.request.model.identity for name, one in asked.items()} == {name: name for name in asked}
    prompts = {name: one.request.composition.prompt for name, one in asked.items()}
    assert prompts == {"base": "a cook", "single": "a <clown>", "fused": "a <clown>"}
    assert {one.plain for one in asked.values()} == {"a cook"}


def test_the_page_needs_no_other_file_and_runs_no_strangers_code():
    page = """{% extends "page.html.j2" %}{% from "page.html.j2" import table, figure %}{% block title %}{{ title }}
    {% endblock %}{% block body %}{{ figure(image|enlarged(2), caption) }}{{ table(["a"], [[text]]) }}{% endblock %}"""
    strange = {"title": "A <title>", "text": "<script>alert(1)</script>", "caption": '"><img src=x onerror=alert(1)>'}
    text = templates().from_string(page).render(image=Image.new("RGB", (4, 4), "red"), **strange)
    assert "<script" not in text and "onerror=alert(1)>" not in text.replace("&gt;", "")
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', text)) == {"data:"}
    assert enlarged(Image.new("RGB", (4, 4)), 2).startswith("data:image/png;base64,")


def test_what_cannot_be_evaluated_is_named(tmp_path):
    with pytest.raises(SettingsError, match="expected FILE=FOLDER"):
        suite_of_files(["cat.safetensors"])
    with pytest.raises(SettingsError, match="`clip`"):
        scorer_for("some/base", None)
    with pytest.raises(DatasetError, match="no such folder"):
        references_of(tmp_path / "missing")
