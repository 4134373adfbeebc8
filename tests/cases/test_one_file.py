"""A checkpoint in one file needs nothing else offline, and what it says of itself goes before any default.

Covers issue 19 §2.5 and §2.15; case 04 (v-prediction drawn as noise).
"""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import save_file

from mixofshow.bases import originals
from mixofshow.bases.loading import load_base
from mixofshow.bases.originals import FOLDER, carried_tokenizers
from mixofshow.errors import BaseModelError, SettingsError
from mixofshow.files import write_tensors
from tests.bases.test_loading import GOLDEN_BASE, original_tensors


@pytest.fixture(scope="module")
def tensors(golden_pipeline):
    return original_tensors(golden_pipeline)


# ---- what the package carries

SIZES = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
"""How many weights the published models have."""


@pytest.mark.parametrize("kind", SIZES)
def test_the_configurations_are_the_published_models(kind):
    index = json.loads((FOLDER / kind / "model_index.json").read_text())
    for part, expected in SIZES[kind].items():
        library, name = index[part]
        config = json.loads((FOLDER / kind / part / "config.json").read_text())
        with init_empty_weights():
            if library == "transformers":
                model = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
            else:
                model = getattr(diffusers, name).from_config(config)
        assert model.num_parameters() == expected, part


def test_the_vocabulary_is_clips():
    """Ids that CLIP's own tokenizer gives (openai/CLIP, simple_tokenizer.py)."""
    first = carried_tokenizers(FOLDER / "sd1")["tokenizer"]
    assert len(first) == 49408
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert first("Hello, World!").input_ids == [49406, 3306, 267, 1002, 256, 49407]
    assert first("hello", padding="max_length").input_ids == [49406, 3306, *[49407] * 75]
    second = carried_tokenizers(FOLDER / "sdxl")["tokenizer_2"]
    assert second("hello", padding="max_length").input_ids == [49406, 3306, 49407, *[0] * 74]


def test_one_file_is_enough(tensors, golden_pipeline, tmp_path, monkeypatch, offline):
    """The tiny base stands for SD 1.5: its configurations and vocabulary instead of the full-sized ones."""
    save_file(tensors, tmp_path / "sd15.safetensors")
    with pytest.raises(BaseModelError, match="configuration and tokenizer of .* are not here"):
        load_base(tmp_path / "sd15.safetensors")  # known to be no SD 1.5 by its sizes
    monkeypatch.setattr(originals, "FOLDER", tmp_path / "original")
    shutil.copytree(GOLDEN_BASE, tmp_path / "original" / "sd1", ignore=lambda *_: ["model.safetensors", "tokenizer"])
    monkeypatch.setattr(originals, "_WIDE", {})
    own = {"tokenizer": golden_pipeline.tokenizer}
    monkeypatch.setattr("mixofshow.bases.weight_files.carried_tokenizers", lambda folder: own)
    found = load_base(tmp_path / "sd15.safetensors")
    assert torch.equal(found.unet.conv_in.weight, golden_pipeline.unet.conv_in.weight)
    assert found.tokenizer is golden_pipeline.tokenizer


# ---- what the file says


def loaded(tensors, tmp_path, more=(), metadata=None, name="shared.safetensors", **options):
    file = tmp_path / name
    write_tensors(file, {**tensors, **{name: torch.zeros(0) for name in more}}, metadata or {})
    return load_base(file, config=GOLDEN_BASE, **options).scheduler


def test_without_a_word_the_configuration_holds(tensors, tmp_path, caplog):
    assert loaded(tensors, tmp_path).config.prediction_type == "epsilon"
    assert (
        loaded(tensors, tmp_path, metadata={"modelspec.prediction_type": "epsilon"}).config.prediction_type == "epsilon"
    )
    assert not caplog.records


@pytest.mark.parametrize("said", ["key", "modelspec", "option"])
def test_v_prediction_is_followed_and_said(tensors, tmp_path, caplog, said):
    more = {
        "key": {"more": ["v_pred"]},
        "modelspec": {"metadata": {"modelspec.prediction_type": "v"}},
        "option": {"prediction": "v_prediction"},
    }[said]
    assert loaded(tensors, tmp_path, **more).config.prediction_type == "v_prediction"
    assert "prediction_type v_prediction (not epsilon)" in caplog.text


@pytest.mark.parametrize("called", ["noob-vpred.safetensors", "XL_vPred10.safetensors", "v-prediction.safetensors"])
def test_a_name_that_disagrees_is_said(tensors, tmp_path, caplog, called):
    """Issue 19 §2.5: what is called v-prediction and says nothing inside was drawn as noise without a word."""
    loaded(tensors, tmp_path, name=called)
    assert "called v-prediction, but read as epsilon; `prediction` v_prediction sets it" in caplog.text
    caplog.clear()
    loaded(tensors, tmp_path, name=called, prediction="epsilon")
    assert not caplog.records


def test_the_option_goes_before_the_file(tensors, tmp_path):
    assert loaded(tensors, tmp_path, more=["v_pred"], prediction="epsilon").config.prediction_type == "epsilon"
    with pytest.raises(SettingsError, match="prediction: expected one of epsilon, v, v_prediction, found 'x0'"):
        loaded(tensors, tmp_path, prediction="x0")


def test_zero_terminal_snr_is_followed(tensors, tmp_path):
    scheduler = loaded(tensors, tmp_path, more=["v_pred", "ztsnr"])
    assert scheduler.config.rescale_betas_zero_snr and scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] < 1e-6


def test_a_prediction_of_another_kind_is_refused_and_an_unknown_one_said(tensors, tmp_path, caplog):
    with pytest.raises(BaseModelError, match="predicts as EDM does"):
        loaded(tensors, tmp_path, more=["edm_vpred.sigma_max"])
    loaded(tensors, tmp_path, metadata={"modelspec.prediction_type": "flow"})
    assert "prediction type 'flow' is not known" in caplog.text
