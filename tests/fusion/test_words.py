"""Refitted words serve the fused weights better, and are nobody else's business."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import load_model, load_unfused, with_concept
from mixofshow.concepts.prompts import encode_prompts, layerwise
from mixofshow.fusion import words
from mixofshow.fusion.recording import Source
from mixofshow.fusion.settings import PAPER, FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.fusion.store import open_store
from mixofshow.fusion.words import PICTURES, own_lessons, refit_words

BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
PLAIN = FusionSettings(**PAPER, method="average", steps=2)
REFIT = PLAIN.model_copy(update={"refit_words": 6})


@pytest.fixture(scope="module")
def plain(golden_pipeline, golden_concepts):
    return fuse(golden_concepts, golden_pipeline, PLAIN)


@pytest.fixture(scope="module")
def refitted(golden_pipeline, golden_concepts):
    return fuse(golden_concepts, golden_pipeline, REFIT)


@torch.no_grad()
def predictions(model, lessons):
    """What a model predicts for lessons, one by one."""
    with model.active(), layerwise(model.pipeline.unet):
        return [
            model.pipeline.unet(
                one.latents[None], one.timestep, encode_prompts(model.pipeline, [one.prompt], model.vocabulary).hidden
            ).sample[0]
            for one in lessons
        ]


def equal_words(first, second):
    assert list(first.embeddings) == list(second.embeddings)
    return all(torch.equal(vector, second.embeddings[word]) for word, vector in first.embeddings.items())


def test_lessons_are_the_concepts_own_models(golden_pipeline, golden_concepts):
    for concept in golden_concepts:
        lessons = own_lessons(golden_pipeline, Source.of(concept, PLAIN), PLAIN)
        assert len(lessons) == len(PLAIN.prompts) * PICTURES * PLAIN.steps
        assert {one.prompt for one in lessons} == {prompt.replace("{}", concept.prompt) for prompt in PLAIN.prompts}
        found = predictions(with_concept(golden_pipeline, concept), lessons)
        torch.testing.assert_close(torch.stack(found), torch.stack([one.prediction for one in lessons]))


def test_the_loss_falls_and_is_what_it_says(golden_pipeline, golden_concepts, plain, refitted):
    assert refitted.refitted.keys() == {concept.info.name for concept in golden_concepts}
    for concept in golden_concepts:
        lessons = own_lessons(golden_pipeline, Source.of(concept, PLAIN), PLAIN)
        wanted = torch.stack([one.prediction for one in lessons])
        measured = [
            float((torch.stack(predictions(one.model, lessons)) - wanted).square().mean()) for one in (plain, refitted)
        ]
        assert refitted.refitted[concept.info.name] == pytest.approx(measured, rel=1e-4)
        assert measured[1] < 0.95 * measured[0]


def test_nothing_but_words_is_changed(plain, refitted):
    assert not equal_words(plain.model.vocabulary, refitted.model.vocabulary)
    assert plain.model.vocabulary.aliases == refitted.model.vocabulary.aliases
    assert plain.model.weights.keys() == refitted.model.weights.keys()
    assert all(torch.equal(weight, refitted.model.weights[name]) for name, weight in plain.model.weights.items())
    assert refitted.model.concepts == plain.model.concepts


def test_a_concepts_words_are_its_own_business(golden_pipeline, random_concept, plain, refitted):
    first, second = plain.model.concepts
    found, _ = refit_words(golden_pipeline, [random_concept("cat", seed=1), first], plain.model.weights, REFIT)
    expected = torch.stack([refitted.model.vocabulary.embeddings[word] for word in first.info.words])
    assert torch.equal(found[1].embeddings, expected)
    # ... and the other is read as ever beside them.
    beside, alone = vocabulary([found[1], second]), vocabulary([second])
    texts = [encode_prompts(golden_pipeline, [f"a {second.prompt}"], known).hidden for known in (beside, alone)]
    assert torch.equal(*texts)


def test_the_order_of_the_files_does_not_matter(golden_pipeline, golden_concepts, refitted):
    turned = fuse(golden_concepts[::-1], golden_pipeline, REFIT)
    assert equal_words(turned.model.vocabulary, refitted.model.vocabulary)
    assert turned.refitted == refitted.refitted


def test_the_pipeline_is_left_as_it_was_without_gradients(golden_pipeline, golden_concepts, plain):
    pipeline = copy.deepcopy(golden_pipeline)
    parts = (pipeline.unet.requires_grad_(True), pipeline.text_encoder.requires_grad_(True))
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    refit_words(pipeline, golden_concepts, plain.model.weights, REFIT.model_copy(update={"refit_words": 1}))
    for part, state in zip(parts, before, strict=True):
        assert part.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
        assert all(parameter.grad is None for parameter in part.parameters())
    assert not any(concept.embeddings.requires_grad for concept in golden_concepts)


@pytest.mark.parametrize(("steps", "count"), [(0, 2), (5, 1)])
def test_without_steps_or_company_words_stay(steps, count, golden_pipeline, golden_concepts):
    concepts = golden_concepts[:count]
    fused = fuse(concepts, golden_pipeline, PLAIN.model_copy(update={"refit_words": steps}))
    assert fused.refitted == {}
    assert equal_words(fused.model.vocabulary, vocabulary(fused.model.concepts))


def test_words_that_get_no_better_stay(golden_pipeline, golden_concepts, plain, monkeypatch):
    monkeypatch.setattr(words, "RATE", 1e3)
    found, losses = refit_words(
        golden_pipeline, golden_concepts, plain.model.weights, REFIT.model_copy(update={"refit_words": 1})
    )
    assert list(found) == list(golden_concepts)
    assert all(before == after > 0 for before, after in losses.values())


def test_a_vector_for_all_layers_stays_one(golden_pipeline, golden_concepts, plain):
    shared = [replace(concept, embeddings=concept.embeddings[:, :1]) for concept in golden_concepts]
    found, losses = refit_words(golden_pipeline, shared, plain.model.weights, REFIT)
    assert all(after < before for before, after in losses.values())
    assert [one.embeddings.shape for one in found] == [one.embeddings.shape for one in shared]


def test_a_saved_model_has_the_words_and_the_concepts_as_they_were(refitted, tmp_path):
    refitted.model.save(tmp_path / "fused")
    refitted.model.save_delta(tmp_path / "fused.safetensors")
    for loaded in (load_model(tmp_path / "fused"), load_model(tmp_path / "fused.safetensors", base=BASE)):
        assert equal_words(loaded.vocabulary, refitted.model.vocabulary)
    kept = load_unfused(tmp_path / "fused", base=BASE)
    assert {one.hash for one in kept.concepts} == {one.hash for one in refitted.model.concepts}


def test_refitting_needs_no_new_recording_and_tells_how_far_it_is(golden_pipeline, golden_concepts, recorded, tmp_path):
    settings = FusionSettings(**{**PAPER, "refine": 1}, steps=1)
    fuse(golden_concepts, golden_pipeline, settings, store=open_store(tmp_path))
    recorded.clear()
    told = []
    fuse(
        golden_concepts,
        golden_pipeline,
        settings.model_copy(update={"refit_words": 2}),
        store=open_store(tmp_path),
        progress=lambda step, total, info: told.append((step, total, *info)),
    )
    assert not recorded
    assert told[-4:] == [(step, 4, "loss") for step in range(1, 5)]
