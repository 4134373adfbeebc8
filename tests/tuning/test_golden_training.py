"""One training step against the reference implementation: losses, gradients, and what it started from."""

from __future__ import annotations

import contextlib

import pytest
import torch

from mixofshow.bases.layers import TEXT_PREFIX, cross_attentions
from mixofshow.concepts.prompts import layerwise
from mixofshow.concepts.words import Vocabulary, token_ids
from mixofshow.tuning.adapters import PlaceholderEmbeddings, initial_words, lora_adapters
from mixofshow.tuning.losses import Batch, Pictures, TrainingLoss, recorded_attention
from mixofshow.tuning.settings import make_settings

TOLERANCE = 1e-4
"""Of gradients, as the goldens' README suggests; losses repeat to 1e-6."""


def _settings(**changed):
    table = {"name": "dogx", "class_word": "dog", "data": "nowhere", "base": "golden"}
    return make_settings({**table, **changed})


@pytest.fixture
def step(golden, golden_pipeline, golden_concepts):
    """`step(settings)` runs the golden batch forwards and backwards: figures, words, and the changes by layer."""
    expected, concept = golden("g_train"), golden_concepts[0]

    def run(settings, *, valid=None):
        words = PlaceholderEmbeddings(concept.embeddings.transpose(0, 1), 2)
        known = Vocabulary(dict.fromkeys(concept.info.words, torch.empty(0)))
        first = golden_pipeline.text_encoder.get_input_embeddings().num_embeddings
        ids = [token_ids(one, golden_pipeline.tokenizer, known, first, 77) for one in expected.values["prompts"]]
        ones = torch.ones_like(expected["masks"])
        pictures = Pictures(
            expected["latents"], expected["masks"], ones if valid is None else valid, torch.tensor([True, True])
        )
        batch = Batch(pictures, expected["noise"], expected["timesteps"], (torch.tensor(ids),))
        regularized = settings.loss.attention_weight > 0
        with (
            lora_adapters(golden_pipeline, settings) as changes,
            layerwise(golden_pipeline.unet),
            recorded_attention(golden_pipeline.unet) if regularized else contextlib.nullcontext() as maps,
        ):
            for name, change in changes.items():
                down, up = change.parameters()
                down.data.copy_(concept.deltas[name].down)
                up.data.copy_(concept.deltas[name].up)
            figures = TrainingLoss(golden_pipeline, words, changes, settings, maps)(batch)
            figures["loss"].backward()
            gradients = {name: [one.grad for one in change.parameters()] for name, change in changes.items()}
        return {name: float(one.detach()) for name, one in figures.items()}, words.moving.grad, gradients

    return run


CASES = {
    "plain": {},
    "imgmask": {"loss.masked": False},
    "reg0.01": {"loss.attention_weight": 0.01, "loss.full_identity": False},
    "reg0.01_full": {"loss.attention_weight": 0.01, "loss.full_identity": True},
    "reg1.0": {"loss.attention_weight": 1.0, "loss.full_identity": False},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_references(case, golden, step, relative_error):
    expected = golden("g_train")
    wanted = expected.values["cases"][case]
    valid = expected["img_masks"] if case == "imgmask" else None
    figures, words, gradients = step(_settings(**CASES[case]), valid=valid)
    assert figures["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    if wanted["attn_loss"] is not None:
        assert figures["attention"] == pytest.approx(wanted["attn_loss"], rel=1e-5)
    assert float(words.norm()) == pytest.approx(wanted["grad_norm_embedding_concept_rows"], rel=TOLERANCE)
    for part, key in (("text_encoder.", "grad_norm_text_lora"), ("unet.", "grad_norm_unet_lora")):
        own = [one.norm() for name, both in gradients.items() if name.startswith(part) for one in both]
        assert float(torch.stack(own).norm()) == pytest.approx(wanted[key], rel=TOLERANCE)
    for name, norm in wanted.get("grad_norm_per_module", {}).items():
        module, half = name.rsplit(".lora_", 1)
        ours = f"text_encoder.{module}" if module.startswith(TEXT_PREFIX) else f"unet.{module}"
        found = gradients[ours][0 if half.startswith("down") else 1]
        assert float(found.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-7), name


def test_gradients_are_the_references_number_for_number(golden, step, relative_error):
    expected = golden("g_train")
    _, words, gradients = step(_settings())
    rows = words.transpose(0, 1).flatten(0, 1)  # the reference's rows: all layers of the first word, then the second's
    assert relative_error(rows, expected["grad.plain.embedding_rows"]) < TOLERANCE
    compared = 0
    for key, wanted in expected.tensors.items():
        if key.startswith("grad.plain.") and ".lora_" in key:
            module, half = key.removeprefix("grad.plain.").rsplit(".lora_", 1)
            ours = f"text_encoder.{module}" if module.startswith(TEXT_PREFIX) else f"unet.{module}"
            assert relative_error(gradients[ours][0 if half.startswith("down") else 1], wanted) < TOLERANCE, key
            compared += 1
    assert compared >= 20


def test_pictures_are_encoded_as_the_reference_does(golden, golden_pipeline, relative_error):
    expected = golden("g_train")
    images = expected["images_low"].repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        posterior = golden_pipeline.vae.encode(images).latent_dist
    assert relative_error(posterior.mean[:1], expected["vae_mean_0"]) < 1e-5
    assert relative_error(posterior.std.mean((2, 3)), expected["vae_std_mean"]) < 1e-5


def test_a_fresh_run_starts_as_the_reference_does(golden, golden_pipeline):
    wanted = golden("g_train").values["fresh_trainer"]
    settings = _settings(class_word="man")
    words = initial_words(golden_pipeline, settings, torch.Generator().manual_seed(0))
    with lora_adapters(golden_pipeline, settings) as changes:
        sizes = {
            part: sum(
                one.numel() for name, both in changes.items() if name.startswith(part) for one in both.parameters()
            )
            for part in ("text_encoder.", "unet.")
        }
        assert all(not both.parameters()[1].any() for both in changes.values()) == wanted["lora_up_all_zero"]
    assert list(sizes.values()) == wanted["trainable_per_group"][1:]
    assert [settings.words.rate, settings.text_encoder.rate, settings.unet.rate] == wanted["lrs"]
    assert words().shape == (len(cross_attentions(golden_pipeline.unet)), 2, 32)
    assert abs(float(words().detach()[:, 0].std()) - wanted["rand_word_std"]) < 0.005
