"""Refitted models predict more like the concepts' own, and nothing else is touched."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixofshow.bases.layers import layer, matrix
from mixofshow.concepts.adapters import replaced
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import USUAL_GUIDANCE, load_model, load_unfused, with_concept
from mixofshow.concepts.prompts import encode_prompts, layerwise
from mixofshow.errors import SettingsError
from mixofshow.fusion import refitting
from mixofshow.fusion.recording import Source
from mixofshow.fusion.refitting import PICTURES, Refitted, refit, teacher_samples
from mixofshow.fusion.settings import PAPER, FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.fusion.store import Store

BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
PLAIN = FusionSettings(**PAPER, method="average", steps=2)
REFIT = PLAIN.model_copy(update={"refit": 6})
ENOUGH = {"refit": 12}
"""Steps after which every concept's loss has fallen."""


@pytest.fixture(scope="module")
def plain(golden_pipeline, golden_concepts):
    return fuse(golden_concepts, golden_pipeline, PLAIN)


@pytest.fixture(scope="module")
def refitted(golden_pipeline, golden_concepts):
    return fuse(golden_concepts, golden_pipeline, REFIT.model_copy(update=ENOUGH))


@torch.no_grad()
def predictions(model, lessons, guidance=USUAL_GUIDANCE):
    """What a model predicts for lessons, one by one, with guidance, (lessons, channels, rows, columns)."""

    def predicted(one, prompt):
        text = encode_prompts(model.pipeline, [prompt], model.vocabulary).hidden
        return model.pipeline.unet(one.latents[None], one.timestep, text).sample[0]

    with model.active(), layerwise(model.pipeline.unet):
        pairs = [(predicted(one, ""), predicted(one, one.prompt)) for one in lessons]
    return torch.stack([empty + guidance * (prompted - empty) for empty, prompted in pairs])


def equal_words(first, second):
    assert list(first.embeddings) == list(second.embeddings)
    return all(torch.equal(vector, second.embeddings[word]) for word, vector in first.embeddings.items())


def equal_weights(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_lessons_are_the_concepts_own_models(golden_pipeline, golden_concepts):
    for concept in golden_concepts:
        lessons = teacher_samples(golden_pipeline, Source.of(concept, PLAIN), PLAIN)
        assert [len(prompt) for prompt in lessons] == [PICTURES * PLAIN.steps] * len(PLAIN.prompts)
        for prompt, ours in zip(PLAIN.prompts, lessons, strict=True):
            assert {one.prompt for one in ours} == {prompt.replace("{}", concept.prompt)}
            found = predictions(with_concept(golden_pipeline, concept), ours)
            torch.testing.assert_close(found, torch.stack([one.prediction for one in ours]), rtol=0, atol=1e-4)


def test_every_picture_of_the_lessons_begins_with_a_noise_of_its_own(golden_pipeline, golden_concepts):
    lessons = teacher_samples(golden_pipeline, Source.of(golden_concepts[0], PLAIN), PLAIN)
    first = [one.latents for prompt in lessons for one in prompt[:PICTURES]]
    assert len(first) == PICTURES * len(PLAIN.prompts) > PICTURES
    assert len({one.numpy().tobytes() for one in first}) == len(first)


def test_the_loss_falls_and_is_what_it_says(golden_pipeline, golden_concepts, plain, refitted):
    assert refitted.refitted.keys() == {concept.info.name for concept in golden_concepts}
    for concept in golden_concepts:
        # So few that all of them are looked at.
        lessons = [
            one for prompt in teacher_samples(golden_pipeline, Source.of(concept, PLAIN), PLAIN) for one in prompt
        ]
        wanted = torch.stack([one.prediction for one in lessons])
        measured = [
            float(((predictions(one.model, lessons) - wanted) / USUAL_GUIDANCE).square().mean())
            for one in (plain, refitted)
        ]
        assert refitted.refitted[concept.info.name] == pytest.approx(measured, rel=1e-4)
        assert measured[1] < 0.95 * measured[0]


def test_words_and_weights_learn_and_the_concepts_stay(plain, refitted):
    assert not equal_words(plain.model.vocabulary, refitted.model.vocabulary)
    assert not equal_weights(plain.model.weights, refitted.model.weights)
    assert plain.model.vocabulary.aliases == refitted.model.vocabulary.aliases
    assert refitted.model.concepts == plain.model.concepts


def test_with_a_prior_the_base_teaches_too(golden_pipeline, golden_concepts, plain):
    """Its own prompt is then predicted more like the base does than without."""
    settings = REFIT.model_copy(update={"refit": 5, "prior_prompts": ("a house",)})
    wanted = [
        one for prompt in teacher_samples(golden_pipeline, Source(None, ("a house",), ()), settings) for one in prompt
    ]

    def drift(prior: float) -> float:
        found = refit(
            golden_pipeline, golden_concepts, plain.model.weights, settings.model_copy(update={"prior": prior})
        )
        made = predictions(replace(plain.model, weights=found.weights), wanted, guidance=1)
        return float((made - torch.stack([one.prediction for one in wanted])).square().mean())

    assert drift(1.0) < 0.8 * drift(0.0)


def test_gradients_are_those_of_the_weights_themselves(golden_pipeline, golden_concepts, plain):
    """One step against plain autograd on a copy that has the weights as its own parameters."""
    lessons = teacher_samples(golden_pipeline, Source.of(golden_concepts[0], PLAIN), PLAIN)[0][:2]
    weights = {name: weight.clone().requires_grad_() for name, weight in plain.model.weights.items()}
    with refitting._computing_with(golden_pipeline, weights), layerwise(golden_pipeline.unet):
        found = torch.autograd.grad(refitting._loss(golden_pipeline, golden_concepts[0], lessons), [*weights.values()])
    pipeline = copy.deepcopy(golden_pipeline)
    with replaced(pipeline, plain.model.weights), layerwise(pipeline.unet):
        own = [layer(pipeline, name).weight.requires_grad_() for name in weights]
        expected = torch.autograd.grad(refitting._loss(pipeline, golden_concepts[0], lessons), own)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.view_as(ours))


def test_the_order_of_the_files_does_not_matter(golden_pipeline, golden_concepts):
    settings = REFIT.model_copy(update={"refit": 2})
    found, turned = (fuse(files, golden_pipeline, settings) for files in (golden_concepts, golden_concepts[::-1]))
    assert equal_words(turned.model.vocabulary, found.model.vocabulary)
    assert equal_weights(turned.model.weights, found.model.weights)
    assert turned.refitted == found.refitted


def test_the_pipeline_is_left_as_it_was_without_gradients(golden_pipeline, golden_concepts, plain):
    pipeline = copy.deepcopy(golden_pipeline)
    parts = (pipeline.unet.requires_grad_(True), pipeline.text_encoder.requires_grad_(True))
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    kinds = [[type(module) for module in part.modules()] for part in parts]
    kept = {name: weight.clone() for name, weight in plain.model.weights.items()}
    refit(pipeline, golden_concepts, plain.model.weights, REFIT.model_copy(update={"refit": 1, "prior": 1.0}))
    for part, state, kind in zip(parts, before, kinds, strict=True):
        assert part.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in part.parameters())
        assert [type(module) for module in part.modules()] == kind
    assert equal_weights(kept, plain.model.weights)
    assert not any(concept.embeddings.requires_grad for concept in golden_concepts)


@pytest.mark.parametrize(("steps", "count"), [(0, 2), (5, 1)])
def test_without_steps_or_company_all_stays(steps, count, golden_pipeline, golden_concepts):
    concepts = golden_concepts[:count]
    fused = fuse(concepts, golden_pipeline, PLAIN.model_copy(update={"refit": steps}))
    assert fused.refitted == {}
    assert equal_words(fused.model.vocabulary, vocabulary(fused.model.concepts))
    assert equal_weights(fused.model.weights, fuse(concepts, golden_pipeline, PLAIN).model.weights)


def test_what_gets_no_better_stays(golden_pipeline, golden_concepts, plain, monkeypatch):
    monkeypatch.setattr(refitting, "WEIGHT_RATE", 1e3)
    found = refit(golden_pipeline, golden_concepts, plain.model.weights, REFIT)
    assert found == Refitted(golden_concepts, plain.model.weights, found.losses)
    assert all(before == after > 0 for before, after in found.losses.values())


def test_half_precision_learns_in_single(golden_pipeline, golden_concepts, plain):
    """Steps far smaller than bf16 resolves add up."""
    pipeline = copy.deepcopy(golden_pipeline).to(torch.bfloat16)
    weights = {name: weight.bfloat16() for name, weight in plain.model.weights.items()}
    found = refit(pipeline, golden_concepts, weights, REFIT)
    assert all(weight.dtype is torch.bfloat16 for weight in found.weights.values())
    assert sum(after for _, after in found.losses.values()) < 0.95 * sum(before for before, _ in found.losses.values())


def test_a_vector_for_all_layers_stays_one(golden_pipeline, golden_concepts, plain):
    shared = [replace(concept, embeddings=concept.embeddings[:, :1]) for concept in golden_concepts]
    found = refit(golden_pipeline, shared, plain.model.weights, REFIT)
    assert all(after < before for before, after in found.losses.values())
    assert [one.embeddings.shape for one in found.concepts] == [one.embeddings.shape for one in shared]


def test_what_the_guard_turns_down_is_taught_as_it_is_heard(golden_pipeline, golden_concepts):
    cat, dog = golden_concepts
    loud = dataclasses.replace(dog, deltas={name: one.scaled(1e3) for name, one in dog.deltas.items()})
    found = fuse([cat, loud], golden_pipeline, REFIT.model_copy(update={"guard": True, "refit": 1}))
    assert list(found.verdicts) == [dog.info.name]
    assert all(torch.isfinite(weight).all() for weight in found.model.weights.values())
    assert all(math.isfinite(loss) for losses in found.refitted.values() for loss in losses)


def test_a_saved_model_is_the_refitted_one_and_has_the_concepts_as_they_were(refitted, tmp_path):
    refitted.model.save(tmp_path / "fused")
    refitted.model.save_delta(tmp_path / "fused.safetensors")
    for loaded in (load_model(tmp_path / "fused"), load_model(tmp_path / "fused.safetensors", base=BASE)):
        assert equal_words(loaded.vocabulary, refitted.model.vocabulary)
        for name, weight in refitted.model.weights.items():
            found = loaded.weights.get(name, matrix(layer(loaded.pipeline, name)))
            torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
    kept = load_unfused(tmp_path / "fused", base=BASE)
    assert {one.hash for one in kept.concepts} == {one.hash for one in refitted.model.concepts}


def test_refitting_needs_no_new_recording_and_tells_how_far_it_is(golden_pipeline, golden_concepts, recorded, tmp_path):
    settings = FusionSettings(**{**PAPER, "refine": 1}, steps=1)
    fuse(golden_concepts, golden_pipeline, settings, store=Store(tmp_path))
    recorded.clear()
    told = []
    fuse(
        golden_concepts,
        golden_pipeline,
        settings.model_copy(update={"refit": 2}),
        store=Store(tmp_path),
        progress=lambda step, total, info: told.append((step, total, *info)),
    )
    assert not recorded
    assert told[-4:] == [(step, 4, "loss") for step in range(1, 5)]


def test_refitting_in_half_precision_is_refused_before_anything_is_recorded(golden_pipeline, golden_concepts):
    half = copy.deepcopy(golden_pipeline).to(torch.float16)
    with pytest.raises(SettingsError, match="refit: does not work in fp16; load the base in bf16 or fp32"):
        fuse(golden_concepts, half, REFIT)
