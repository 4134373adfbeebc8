"""The UNet counts its layers and predicts noise as the reference does (golden part b)."""

from __future__ import annotations

import pytest
import torch

from mixofshow.bases.layers import cross_attentions, lora_layers
from mixofshow.concepts.adapters import tuned_weights
from mixofshow.concepts.model import with_concept
from mixofshow.concepts.prompts import layerwise

TOLERANCE = 1e-5


def test_layers_are_counted_down_mid_up(golden, golden_pipeline):
    found = {name: index for index, name in enumerate(cross_attentions(golden_pipeline.unet))}
    assert found == golden("b_unet").values["cross_attention_index"]


def test_every_tuned_layer_is_known(golden_pipeline, golden_concepts):
    known = lora_layers(golden_pipeline)
    assert len(known) == 12 + 128
    for concept in golden_concepts:
        assert set(concept.deltas) == set(known)


@pytest.mark.parametrize("shape", ["sq", "wide"])
def test_plain_noise(shape, golden, golden_pipeline, relative_error):
    expected, text = golden("b_unet"), golden("a_text")["plain.embeds"][:1]
    with torch.no_grad():
        found = golden_pipeline.unet(expected[f"latents_{shape}"], 500, text).sample
    assert relative_error(found, expected[f"plain.noise_{shape}_t500"]) < TOLERANCE


@pytest.mark.parametrize("alpha", [0.7, 1.0])
@pytest.mark.parametrize("shape", ["sq", "wide"])
@pytest.mark.parametrize("timestep", [10, 500, 900])
def test_noise_of_a_concept(timestep, shape, alpha, golden, golden_pipeline, golden_concepts, relative_error):
    expected, text = golden("b_unet"), golden("a_text")[f"embeds_alpha{alpha}_prompt1"]
    unet = golden_pipeline.unet
    with torch.no_grad(), with_concept(golden_pipeline, golden_concepts[0], alpha).active(), layerwise(unet):
        found = unet(expected[f"latents_{shape}"], timestep, text).sample
    assert relative_error(found, expected[f"noise_alpha{alpha}_{shape}_t{timestep}"]) < TOLERANCE


def test_merged_weights(golden, golden_pipeline, golden_concepts, relative_error):
    merged = {key: weight for key, weight in golden("b_unet").tensors.items() if key.startswith("merged0.7.")}
    assert len(merged) == 3
    for key, expected in merged.items():
        layer = "unet." + key.removeprefix("merged0.7.").removesuffix(".weight")
        found = tuned_weights(golden_pipeline, golden_concepts[0], [layer], 0.7)[layer]
        assert relative_error(found, expected) < TOLERANCE
