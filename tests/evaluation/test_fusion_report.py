"""The page about a fusion says what the fusion found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixofshow.evaluation.fusion_report import (
    BEYOND,
    DARK,
    UNTOUCHED,
    concept_table,
    cost,
    shade,
    write_fusion_report,
)
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.solving import ConceptResidual, share, total
from mixofshow.fusion.stages import fuse


@pytest.fixture(scope="module")
def fused(golden_pipeline, golden_concepts):
    return fuse(
        golden_concepts,
        golden_pipeline,
        FusionSettings(weights="equal", refine=0, mode="independent", steps=1, leave_one_out=True),
    )


def test_every_concept_has_a_row(fused):
    head, rows = concept_table(fused)
    assert head[0] == "concept" and head[-1] == "costs the others"
    assert sorted(row[0] for row in rows) == ["<dogx>", "<manx>"]
    for row in rows:
        kept = total(fused.layers.values(), row[0].strip("<>"))
        assert row[1] == f"{share(kept.residual_sq, kept.target_sq):.3f}"
        assert float(row[-1].removesuffix(" %")) == pytest.approx(100 * cost(kept), abs=0.1)


def test_the_page_has_all_of_it(fused, tmp_path):
    write_fusion_report(tmp_path / "report.html", fused)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    worst = max(fused.layers, key=lambda name: fused.layers[name].residual)
    for expected in (
        "&lt;dogx&gt;",
        worst,
        f"{worst}: {fused.layers[worst].residuals['dogx']:.3f}",
        "independent",
        "guidance scale",
    ):
        assert expected in text, expected


def test_words_alone_make_a_page_too(golden_pipeline, golden_concepts, tmp_path):
    words = fuse(
        [replace(golden_concepts[0], deltas={})], golden_pipeline, FusionSettings(weights="equal", refine=0, steps=1)
    )
    write_fusion_report(tmp_path / "report.html", words)
    assert words.layers == {}


def test_colours_of_the_heat_map():
    assert shade(ConceptResidual(0.0, 1.0)) == DARK.format(0) and shade(ConceptResidual(1.0, 1.0)) == DARK.format(1)
    assert shade(ConceptResidual(2.0, 1.0)) == BEYOND and shade(ConceptResidual(0.0, 0.0)) == UNTOUCHED
