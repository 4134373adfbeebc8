"""Tuning in half precision: the frozen base stays in it, and what is trained is single."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixofshow.bases.families import text_encoders
from mixofshow.bases.layers import layer
from mixofshow.bases.loading import fingerprint, load_base
from mixofshow.concepts.concept import check_fits
from mixofshow.errors import BaseModelError, SettingsError
from mixofshow.tuning.adapters import full_keys_and_values, lora_adapters
from mixofshow.tuning.batches import LatentDataset
from mixofshow.tuning.dataset import read_folder
from mixofshow.tuning.trainer import tune
from tests.conftest import pictures_in, short_run

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"


@pytest.fixture
def settings(tmp_path):
    """`settings(key=value, …)` of four steps on two pictures."""
    quick = {"steps": 4, "batch_size": 2, "unet.rate": 0.01, "text_encoder.rate": 0.01}
    return short_run(pictures_in(tmp_path, "red", "blue"), **quick)


@pytest.fixture(scope="module")
def rounded():
    return load_base(GOLDEN_BASE, dtype=torch.bfloat16)


def weights(pipeline):
    models = (pipeline.unet, pipeline.vae, *(one.model for one in text_encoders(pipeline)))
    return [parameter for model in models for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_is_known_again_in_any_precision(dtype, golden_pipeline):
    loaded = load_base(GOLDEN_BASE, dtype=dtype)
    assert fingerprint(loaded) == fingerprint(golden_pipeline)
    assert {one.dtype for one in weights(loaded)} == {dtype}


def test_a_base_that_others_rounded_is_not_taken_for_another():
    base = load_base(GOLDEN_BASE)
    base.to(torch.bfloat16)
    with pytest.raises(BaseModelError, match=r"in bfloat16 cannot tell it from others; load it by load_base"):
        fingerprint(base)


def test_a_rounded_base_that_was_changed_is_not_taken_for_what_it_was():
    base = load_base(GOLDEN_BASE, dtype=torch.bfloat16)
    fingerprint(base)
    base.unet.conv_in.weight.data *= 2
    with pytest.raises(BaseModelError, match="in bfloat16 cannot tell it from others"):
        fingerprint(base)


@pytest.mark.parametrize(
    ("method", "checkpointing"), [("ed-lora", False), ("ed-lora", True), ("custom-diffusion", False)]
)
def test_bf16_learns_what_fp32_learns_and_leaves_the_base(
    method, checkpointing, settings, rounded, golden_pipeline, relative_error
):
    asked = {"method": method, "prior.weight": 0.0, "gradient_checkpointing": checkpointing}
    before = [one.clone() for one in weights(rounded)]
    found = tune(settings(**asked, precision="bf16"), rounded)
    assert all(
        torch.equal(one, was) and one.dtype == was.dtype for one, was in zip(weights(rounded), before, strict=True)
    )
    expected = tune(settings(**asked), golden_pipeline)
    check_fits(found, golden_pipeline, "found")
    changes = [
        torch.cat([one.deltas[name].matrix().flatten() for name in expected.deltas]) for one in (found, expected)
    ]
    # Adam's first steps go by the sign of each gradient, and rounding turns the small ones: equal they cannot be.
    assert torch.cosine_similarity(*changes, dim=0) > 0.8
    assert relative_error(found.embeddings, expected.embeddings) < 0.05


@pytest.mark.parametrize("changes", [lora_adapters, full_keys_and_values])
def test_what_is_trained_is_single_and_the_rest_is_not(changes, settings, rounded):
    with changes(rounded, settings()) as trained:
        moving = {id(parameter) for change in trained.values() for parameter in change.parameters()}
        by_dtype = {(id(one) in moving, one.dtype) for one in weights(rounded)}
        assert by_dtype == {(True, torch.float32), (False, torch.bfloat16)}
        assert all(layer(rounded, name).weight.dtype == torch.bfloat16 for name in trained)


@pytest.mark.parametrize("precision", ["fp32"])
def test_a_precision_that_the_base_is_not_in_is_refused(precision, settings, rounded):
    with pytest.raises(SettingsError, match=f"precision {precision}: the base's weights are bfloat16; load it as"):
        tune(settings(precision=precision), rounded)


@pytest.mark.parametrize(("size", "at_once"), [(64, [2]), (512, [1, 1])])
def test_large_pictures_are_encoded_one_by_one_and_all_are_kept_in_single(size, at_once, settings, rounded):
    seen = []
    handle = rounded.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    asked = settings(**{"pictures.size": size})
    source = LatentDataset(read_folder(asked.data, instance_prompt="a"), asked.pictures, rounded, seed=0)
    handle.remove()
    assert seen == at_once
    assert {kept.mean.dtype for of_one in source.encoded for kept in of_one} == {torch.float32}
