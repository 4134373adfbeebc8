"""Scores and the report page."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from mixofshow.errors import DatasetError, SettingsError
from mixofshow.evaluation.metrics import Scorer, image_alignment, text_alignment
from mixofshow.evaluation.protocol import (
    Case,
    EvaluationSettings,
    Score,
    case_of,
    evaluate,
    means,
    references_of,
    scorer_for,
)
from mixofshow.evaluation.report import Page


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


def test_text_alignment_is_clipscore():
    assert text_alignment(_unit([1, 0], [1, 0]), _unit([1, 0], [-1, 0])) == pytest.approx(2.5 / 2)


def test_each_model_is_asked_for_its_own_name_of_the_concept(golden_pipeline, golden_concepts):
    asked = []

    def texts(captions):
        asked.extend(captions)
        return _unit(*[[1, 0]] * len(captions))

    scorer = Scorer(lambda images: _unit(*[[1, 0]] * len(images)), texts)
    concept = golden_concepts[0]
    settings = EvaluationSettings(images_per_prompt=2, num_inference_steps=1)
    golden_small = [Image.new("RGB", (8, 8))]
    scores = evaluate(golden_pipeline, [Case(concept, golden_small, ["a {}"])], {}, scorer, settings)
    assert set(scores) == {"lower_bound", "single"}
    assert asked == [f"a {concept.info.class_word}"] * 4
    assert scores["single"][concept.info.name].image == pytest.approx(1)


def test_means_are_over_concepts():
    scores = {"single": {"a": Score(0.5, 1.0, ()), "b": Score(0.7, 0.0, ())}}
    assert means(scores)["image_alignment"]["single"] == pytest.approx(0.6)
    assert means(scores)["text_alignment"]["single"] == pytest.approx(0.5)


def test_the_page_needs_no_other_file_and_runs_no_strangers_code(tmp_path):
    page = Page("A <title>")
    page.paragraph("<script>alert(1)</script>")
    page.figure(Image.new("RGB", (4, 4), "red"), '"><img src=x onerror=alert(1)>')
    page.table(("a", "b"), [("<b>", "1")])
    page.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "onerror=alert(1)>" not in text.replace("&gt;", "")
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', text)) == {"data:"}


def test_what_cannot_be_evaluated_is_named(golden_pipeline, tmp_path):
    with pytest.raises(SettingsError, match="expected FILE=FOLDER"):
        case_of("cat.safetensors", golden_pipeline, "emojiland", "subject")
    with pytest.raises(SettingsError, match="--clip"):
        scorer_for("some/base", None)
    with pytest.raises(DatasetError, match="no such folder"):
        references_of(tmp_path / "missing")
