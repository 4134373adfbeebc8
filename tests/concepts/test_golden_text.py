"""Prompts with a concept's words give the reference's token ids and embeddings (golden part a)."""

from __future__ import annotations

import pytest
import torch

from mixofshow.concepts.adapters import tuned_weights
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import with_concept
from mixofshow.concepts.prompts import encode_prompts
from mixofshow.concepts.words import Vocabulary, token_ids

TOLERANCE = 1e-5


def test_token_ids(golden, golden_pipeline, golden_concepts):
    text = golden("a_text")
    layers, tokens = 16, text["concept.input_ids"].shape[1]
    first = golden_pipeline.text_encoder.get_input_embeddings().num_embeddings
    per_layer = text["concept.input_ids"].view(-1, layers, tokens)
    # The reference numbers a word once per layer (word 16 + layer); here the layer is an axis of its own.
    expected = torch.where(per_layer < first, per_layer, first + (per_layer - first) // layers)
    known = vocabulary([golden_concepts[0]])
    for prompt, rows in zip(text.values["prompts"], expected, strict=True):
        assert rows.unique(dim=0).tolist() == [token_ids(prompt, golden_pipeline.tokenizer, known, first, tokens)]


def test_plain_prompts(golden, golden_pipeline, relative_error):
    text = golden("a_text")
    prompts = ["photo of a man near the beach", "", text.values["NEG"]]
    first = golden_pipeline.text_encoder.get_input_embeddings().num_embeddings
    ids = [token_ids(prompt, golden_pipeline.tokenizer, Vocabulary(), first, 77) for prompt in prompts]
    assert ids == text["plain.input_ids"].tolist()
    for layer in encode_prompts(golden_pipeline, prompts, Vocabulary()).hidden.unbind(1):
        assert relative_error(layer, text["plain.embeds"]) < TOLERANCE


@pytest.mark.parametrize(
    ("key", "prompt", "alpha", "layers"),
    [
        ("embeds_alpha0.0_prompt0_layers_0_15", 0, 0.0, [0, 15]),
        ("embeds_alpha0.7_prompt0", 0, 0.7, range(16)),
        ("embeds_alpha0.7_prompt1", 1, 0.7, range(16)),
        ("embeds_alpha0.7_prompt2_layers_3_12", 2, 0.7, [3, 12]),
        ("embeds_alpha1.0_prompt0_layers_3_12", 0, 1.0, [3, 12]),
        ("embeds_alpha1.0_prompt1", 1, 1.0, range(16)),
        ("embeds_alpha1.0_prompt2_layers_3_12", 2, 1.0, [3, 12]),
    ],
)
def test_embeddings(key, prompt, alpha, layers, golden, golden_pipeline, golden_concepts, relative_error):
    text, concept = golden("a_text"), golden_concepts[0]
    with with_concept(golden_pipeline, concept, alpha).active():
        found = encode_prompts(golden_pipeline, [text.values["prompts"][prompt]], vocabulary([concept])).hidden
    assert relative_error(found[:, list(layers)], text[key]) < TOLERANCE


def test_merged_weight(golden, golden_pipeline, golden_concepts, relative_error):
    layer = "text_encoder.text_model.encoder.layers.1.self_attn.out_proj"
    found = tuned_weights(golden_pipeline, golden_concepts[0], [layer], 0.7)[layer]
    assert (
        relative_error(found, golden("a_text")[f"merged0.7.{layer.removeprefix('text_encoder.')}.weight"]) < TOLERANCE
    )
