"""What newcomers wrote, and got a traceback, a misleading line or no word for."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from mixofshow import FusionSettings, MixOfShowPipeline, Region, fuse, load_concept, load_model, load_unfused, tune
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.errors import MixOfShowError, SettingsError
from mixofshow.images import read_grey, read_image

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
AVERAGE = FusionSettings(method="average")


@pytest.fixture
def files(golden_concepts, tmp_path):
    """The concepts' files."""
    paths = [tmp_path / f"{one.info.name}.safetensors" for one in golden_concepts]
    for concept, path in zip(golden_concepts, paths, strict=True):
        concept.save(path)
    return paths


def test_fusing_as_it_is_written_without_reading_the_manual(golden_pipeline, golden_concepts, files):
    """Keys in the call, files, texts, one alone: all the same as settings and concepts in a list."""

    def weights(*given, **keys):
        return {name: one.sum().item() for name, one in fuse(*given, **keys).model.weights.items()}

    both = weights([load_concept(one) for one in files], golden_pipeline, AVERAGE)
    assert weights(files, golden_pipeline, method="average") == both
    assert weights((str(one) for one in files), golden_pipeline, AVERAGE) == both
    alone = weights([load_concept(files[0])], golden_pipeline, AVERAGE)
    assert weights(load_concept(files[0]), golden_pipeline, AVERAGE) == alone
    assert weights(str(files[0]), golden_pipeline, method="average") == alone
    assert MixOfShowPipeline.single(golden_pipeline, files[0]).model.concepts[0].hash == golden_concepts[0].hash


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda base, one: fuse([one], base, AVERAGE, steps=3), "fuse: steps beside settings that are made"),
        (lambda base, one: fuse([one], base, {"steps": 3}), "fuse: expected FusionSettings, found"),
        (lambda base, one: fuse([one], base, refien=3), "fuse: unknown key 'refien'; did you mean 'refine'"),
        (lambda base, one: fuse([1], base), "expected a concept or its file, found int"),
        (lambda base, one: fuse([], base), "nothing to fuse"),
        (lambda base, one: fuse("none.safetensors", base), "none.safetensors: cannot be read"),
        (lambda base, one: fuse(base, [one]), "expected a base model"),
        (lambda base, one: fuse([one], "emojiland"), "expected a base model, .* found emojiland"),
        (lambda base, one: tune("emojiland", "pictures", name="a", class_word="a"), "expected a base model"),
        (lambda base, one: with_concept("emojiland", one), "expected a base model"),
        (lambda base, one: MixOfShowPipeline.single(base, 3), "expected a concept or its file, found int"),
        (lambda base, one: MixOfShowPipeline.of(base), "of: expected what fuse or load_model gives"),
    ],
)
def test_what_cannot_be_meant_is_one_line(call, message, golden_pipeline, golden_concepts):
    with pytest.raises(MixOfShowError, match=message) as error:
        call(golden_pipeline, golden_concepts[0])
    assert len(str(error.value)) <= 300


LONG = "x" * 300


@pytest.mark.parametrize(
    "call",
    [
        lambda base: read_image(Path(LONG), "a picture"),
        lambda base: load_model(LONG),
        lambda base: load_model(f"{LONG}.safetensors"),
        lambda base: load_unfused(LONG),
        lambda base: fuse(LONG, base),
        lambda base: tune(base, LONG, name="a", class_word="a"),
    ],
)
def test_a_name_that_no_file_can_have_is_no_file(call, golden_pipeline):
    with pytest.raises(MixOfShowError):
        call(golden_pipeline)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_colours_that_are_multiplied_by_their_transparency(mode):
    """La was an error, and RGBa counted as wholly opaque."""
    straight = Image.new(mode.upper(), (40, 40), 200)
    straight.putalpha(128)
    for read in (lambda one: read_image(one, "it").image, lambda one: read_grey(one, "it")):
        found, expected = (np.asarray(read(one), int) for one in (straight.convert(mode), straight))
        assert np.abs(found - expected).max() <= 1


def test_the_a_of_lab_is_no_transparency():
    assert read_image(Image.new("LAB", (40, 40), (200, 128, 128)), "it").notes == ()


@pytest.fixture
def draw(golden_pipeline):
    return MixOfShowPipeline.of(ConceptModel(golden_pipeline))


QUICK = {"width": 64, "height": 48, "num_inference_steps": 1, "output_type": "latent"}


def test_numbers_of_numpy_are_numbers(draw, golden_concepts):
    numpys = {"seed": np.int64(3), "num_images_per_prompt": np.int64(1), "eta": np.float32(0)}
    assert torch.equal(draw("a castle", **QUICK, **numpys)[0], draw("a castle", **QUICK, seed=3)[0])
    draw.load_concept(golden_concepts[0], np.float32(0.5))


def test_regional_lora_without_concepts_says_so(draw, caplog):
    with caplog.at_level(logging.WARNING):
        draw("a castle", regional_lora=True, regions=[Region("a cat", (0, 0, 64, 48))], **QUICK)
    assert "`regional_lora` changes nothing without concepts" in caplog.text


def test_schedulers_of_other_models_are_refused(draw):
    draw.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(SettingsError, match="scheduler: expected one for .* found FlowMatchEulerDiscreteScheduler"):
        draw("a castle", **QUICK)


def test_textual_inversions_are_concepts(draw, tmp_path):
    with pytest.raises(SettingsError, match="load_textual_inversion: load_concept"):
        draw.load_textual_inversion("it.safetensors")
    save_file({"<mine>": torch.ones(1, draw.text_encoder.config.hidden_size)}, tmp_path / "it.safetensors")
    draw.load_concept(tmp_path / "it.safetensors")
    draw("a <mine>", **QUICK)


def test_loading_as_diffusers_does(files):
    here = {"low_cpu_mem_usage": True, "revision": None, "cache_dir": None, "token": None, "device_map": "cpu"}
    assert MixOfShowPipeline.from_pretrained(GOLDEN_BASE, **here).device.type == "cpu"
    for option in ("revision", "cache_dir", "token"):
        with pytest.raises(SettingsError, match=f"from_pretrained: {option}: .*snapshot_download"):
            MixOfShowPipeline.from_pretrained(GOLDEN_BASE, **{option: "x"})
    with pytest.raises(SettingsError, match="device_map: give one device"):
        MixOfShowPipeline.from_pretrained(GOLDEN_BASE, device_map="balanced")
    for name in (files[0], "none.safetensors"):
        with pytest.raises(MixOfShowError, match=str(name)):
            MixOfShowPipeline.from_single_file(name)
