"""Convolutions are tuned like other layers (LoCon): what comes out is what was trained."""

from __future__ import annotations

import pytest
import torch

from mixofshow import load_concept, make_settings, tune
from mixofshow.bases.layers import kernel_of, layer, lora_layers
from mixofshow.concepts.concept import Concept, check_fits
from mixofshow.concepts.model import with_concept
from mixofshow.tuning.adapters import lora_adapters
from tests.conftest import pictures_in

CONVOLUTIONAL = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "samplers.0.conv")


@pytest.fixture
def data(tmp_path):
    return pictures_in(tmp_path / "thing", "red")


@pytest.fixture
def settings():
    return make_settings({"name": "thing", "class_word": "man", "data": "x", "unet.targets": "all", "unet.rank": 3})


def _drawn(pipeline):
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 7, pipeline.unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return pipeline.unet(torch.randn(1, 4, 8, 8, generator=generator), 500, text).sample


def test_the_concept_is_the_tuned_pipeline(golden_pipeline, golden_concepts, settings, relative_error):
    before, generator = _drawn(golden_pipeline), torch.Generator().manual_seed(0)
    with lora_adapters(golden_pipeline, settings) as changes:
        for change in changes.values():
            for factor in change.parameters():  # what half precision holds exactly
                factor.data.copy_((0.1 * torch.randn(factor.shape, generator=generator)).half().float())
        tuned = _drawn(golden_pipeline)
        deltas = {name: change.finished() for name, change in changes.items()}
    concept = Concept(golden_concepts[0].info, golden_concepts[0].embeddings, deltas)
    with with_concept(golden_pipeline, concept).active():
        assert relative_error(_drawn(golden_pipeline), tuned) < 1e-4
    assert relative_error(tuned, before) > 0.1
    assert torch.equal(_drawn(golden_pipeline), before)


@pytest.mark.parametrize("targets", ["convolutions", "all"])
def test_targets_with_convolutions_change_them_and_their_file_is_read(golden_pipeline, data, tmp_path, targets):
    keys = {"unet.targets": targets, "unet.rank": 16, "unet.rate": 0.01, "steps": 2, "batch_size": 1}
    concept = tune(golden_pipeline, data, name="thing", class_word="man", **keys)
    names = {name for name in concept.deltas if name.startswith("unet.")}
    assert names == {name for name in lora_layers(golden_pipeline, unet=targets) if name.startswith("unet.")}
    assert all(any(name.endswith(ending) for name in names) for ending in CONVOLUTIONAL)
    for name in names:
        assert concept.deltas[name].kernel == kernel_of(layer(golden_pipeline, name)), name
        # An output layer of four channels has no rank of 16, and a file that says so is refused.
        assert concept.deltas[name].down.shape[0] == min(16, *concept.deltas[name].shape), name
    check_fits(concept, golden_pipeline, "thing")
    concept.save(tmp_path / "thing.safetensors")
    loaded = load_concept(tmp_path / "thing.safetensors", golden_pipeline)
    assert loaded.hash == concept.hash
    changed = [name for name in names if loaded.deltas[name].matrix().any()]
    assert any(name.endswith("conv1") for name in changed)
