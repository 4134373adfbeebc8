"""The writer holds itself to the reader's checks; both share their limits, which fit what exists.

Covers issue 19 §2.2; case 11; B44; F39 (alpha that is no number or too large, half a character in tags).
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from mixofshow import files
from mixofshow.bases.loading import fingerprint
from mixofshow.concepts.concept import Full, load_concept  # Full: where case 11 imports it from
from mixofshow.concepts.delta import Delta, DeltaInfo
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.errors import ConceptFileError, MixOfShowError, SettingsError, TokenError
from mixofshow.files import TensorFile, read_tensors, write_tensors
from mixofshow.tuning.settings import make_settings

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
KEY = "lora_" + TO_K.replace(".", "_")
HALVES = {f"{KEY}.lora_down.weight": torch.ones(1, 32), f"{KEY}.lora_up.weight": torch.ones(24, 1)}
DOG = ImportSettings(words="dog", name="dog")


def test_limits_fit_sdxl():
    """A LoRA of rank 128 for every layer of SDXL, of LoHa's five tensors for each and a magnitude."""
    layers, parameters = 1050, 2.6e9 + 0.82e9
    assert 6 * layers < files.MAX_TENSORS
    assert 2 * parameters < files.MAX_BYTES  # all of it in full, in half precision


def test_kohyas_counts_of_tags_and_thumbnails(golden_pipeline, tmp_path):
    tags = json.dumps({"10_dog": {f"tag number {number} of many": number for number in range(45_000)}})
    save_file(HALVES, tmp_path / "tags.safetensors", {"ss_tag_frequency": tags})
    assert list(open_concept(tmp_path / "tags.safetensors", golden_pipeline).deltas) == [TO_K]
    write_tensors(tmp_path / "base.safetensors", HALVES, {"modelspec.thumbnail": "A" * 1_500_000})
    assert len(TensorFile(tmp_path / "base.safetensors").shapes()) == 2


@pytest.mark.parametrize(
    "change",
    {
        "no number": {"deltas": {TO_K: Full(torch.full((24, 32), float("nan")))}},
        "over half precision": {"deltas": {TO_K: Full(torch.full((24, 32), 1e6))}},
        "no layer's": {"embeddings": torch.zeros(2, 3, 32)},
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_concept_that_would_not_be_read_is_not_written(golden_concepts, tmp_path, change):
    with pytest.raises(ConceptFileError, match="not written"):
        dataclasses.replace(golden_concepts[0], **change[1]).save(tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "info", [{"license": "terms " * 3000}, {"words": ("<a>", "<a>")}, {"words": ("<A>", "<b>")}, {"name": "../x"}]
)
def test_nor_one_whose_metadata_would_not(golden_concepts, tmp_path, info):
    concept = golden_concepts[0]
    with pytest.raises((ConceptFileError, TokenError), match="not written"):
        dataclasses.replace(concept, info=concept.info.model_copy(update=info)).save(tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


def test_terms_that_are_too_long_are_refused_before_tuning(tmp_path):
    with pytest.raises(SettingsError, match="license"):
        make_settings({"name": "a", "class_word": "dog", "data": tmp_path, "license": "terms " * 3000})


def test_a_delta_that_would_not_be_read_is_not_written(golden_pipeline, tmp_path):
    info = DeltaInfo(base="golden", base_fingerprint=fingerprint(golden_pipeline))
    with pytest.raises(ConceptFileError, match="not written"):
        Delta(info, {}, {TO_K: Full(torch.full((24, 32), float("inf")))}).save(tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "value"), [("MAX_HEADER_BYTES", 100), ("MAX_TENSORS", 1)])
def test_what_is_beyond_the_readers_limits_is_not_written(tmp_path, monkeypatch, limit, value):
    write_tensors(tmp_path / "before.safetensors", HALVES, {})
    monkeypatch.setattr(files, limit, value)
    with pytest.raises(ConceptFileError):
        read_tensors(tmp_path / "before.safetensors")
    with pytest.raises(ConceptFileError, match="would be read again"):
        write_tensors(tmp_path / "after.safetensors", HALVES, {})
    assert not (tmp_path / "after.safetensors").exists()


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor(1e300, dtype=torch.float64), torch.tensor(1 + 1j), torch.tensor(float("-inf")), torch.ones(0)],
)
def test_an_alpha_that_is_no_number(golden_pipeline, tmp_path, alpha):
    save_file(HALVES | {f"{KEY}.alpha": alpha}, tmp_path / "x.safetensors")
    with pytest.raises(ConceptFileError, match="alpha to be one finite number"):
        open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)


@pytest.mark.parametrize("tags", ['{"1_a\\ud800": {}}', '{"1_a": 1, "1_a": 2}', "[" * 100_000, '{"1_a": 1e999}', "[1]"])
def test_tags_of_others_are_read_or_passed_over(golden_pipeline, tmp_path, tags):
    save_file(HALVES, tmp_path / "x.safetensors", {"ss_tag_frequency": tags})
    with pytest.raises(MixOfShowError, match="names no trigger words"):
        open_concept(tmp_path / "x.safetensors", golden_pipeline)


def test_an_infinite_alpha_is_no_concepts(golden_concepts):
    info = golden_concepts[0].info.model_dump()
    for change in ({"alpha": float("inf")}, {"settings": {"rate": float("nan")}}):
        with pytest.raises(ValidationError):
            type(golden_concepts[0].info).model_validate(info | change)


def test_problems_are_shown_three_at_a_time(golden_concepts, golden_pipeline, tmp_path):
    wrong = {f"unet.nowhere{number}": golden_concepts[0].deltas[TO_K] for number in range(40)}
    dataclasses.replace(golden_concepts[0], deltas=wrong).save(tmp_path / "x.safetensors")
    with pytest.raises(ConceptFileError, match="nowhere10.*and 37 more"):
        load_concept(tmp_path / "x.safetensors", golden_pipeline)
