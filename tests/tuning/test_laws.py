"""What tuning may and may not change."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mixofshow.concepts.concept import load_concept
from mixofshow.errors import SettingsError, TokenError
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.tuning.losses import masked_mse, offset_noise
from mixofshow.tuning.methods import class_token, initial_words
from mixofshow.tuning.settings import make_settings
from mixofshow.tuning.trainer import tune


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / "pictures" / f"{number}.png")
    return make_settings(
        {
            "name": "thing",
            "class_word": "man",
            "base": "tiny",
            "data": tmp_path / "pictures",
            "steps": 3,
            "batch_size": 2,
            "embedding_rate": 0.01,
            "unet_rate": 0.01,
        }
    )


def _state(pipeline):
    parts = (pipeline.unet, pipeline.text_encoder)
    return [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]


def test_the_base_is_bit_equal_afterwards(golden_pipeline, settings):
    before = _state(golden_pipeline)
    tune(settings, golden_pipeline)
    for old, new in zip(before, _state(golden_pipeline), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_the_same_seed_gives_the_same_concept_and_another_does_not(golden_pipeline, settings):
    first, second = tune(settings, golden_pipeline), tune(settings, golden_pipeline)
    assert first.hash == second.hash
    assert tune(settings.model_copy(update={"seed": 1}), golden_pipeline).hash != first.hash


def test_what_is_in_memory_is_what_is_in_the_file(golden_pipeline, settings, tmp_path):
    concept = tune(settings, golden_pipeline)
    concept.save(tmp_path / "thing.safetensors")
    loaded = load_concept(tmp_path / "thing.safetensors", golden_pipeline)
    assert loaded.hash == concept.hash and loaded.info == concept.info
    assert torch.equal(loaded.embeddings, concept.embeddings)


def test_no_path_or_caption_is_in_the_file(golden_pipeline, settings, tmp_path):
    (tmp_path / "pictures" / "0.txt").write_text("a very private man")
    tune(settings, golden_pipeline).save(tmp_path / "thing.safetensors")
    content = (tmp_path / "thing.safetensors").read_bytes()
    for secret in (b"private", str(tmp_path).encode(), b"pictures"):
        assert secret not in content


def test_ctrl_c_keeps_what_was_learned(golden_pipeline, settings):
    def stop(step, total, info):
        if step == 2:
            raise KeyboardInterrupt

    before = _state(golden_pipeline)
    assert tune(settings, golden_pipeline, progress=stop).info.settings["steps"] == 2
    assert all(torch.equal(value, _state(golden_pipeline)[0][name]) for name, value in before[0].items())


def test_a_preview_sees_the_concept_once_and_changes_nothing(golden_pipeline, settings):
    drawn = []

    def preview(concept, step):
        draw = MixOfShowPipeline.single(golden_pipeline, concept)
        drawn.append((concept, draw(concept.prompt, num_inference_steps=2, width=32, height=32)[0].tobytes()))

    plain = tune(settings, golden_pipeline)
    watched = tune(settings.model_copy(update={"preview_every": 2}), golden_pipeline, preview=preview)
    assert watched.hash == plain.hash
    ((concept, picture),) = drawn
    again = MixOfShowPipeline.single(golden_pipeline, concept)(
        concept.prompt, num_inference_steps=2, width=32, height=32
    )
    assert again[0].tobytes() == picture


def test_words_stop_at_the_norm_limit(golden_pipeline, settings):
    stopped = tune(settings.model_copy(update={"norm_limit": 1e-6}), golden_pipeline)
    free = tune(settings, golden_pipeline)
    one_step = tune(
        settings.model_copy(update={"norm_limit": 1e-6, "unet_rate": 0, "text_encoder_rate": 0}), golden_pipeline
    )
    assert torch.equal(stopped.embeddings, one_step.embeddings)
    assert not torch.equal(stopped.embeddings, free.embeddings)


def test_words_start_random_and_as_the_class_word(golden_pipeline):
    words = initial_words(golden_pipeline, "man", layers=16, sigma=0.013, generator=torch.Generator().manual_seed(0))
    known = golden_pipeline.text_encoder.get_input_embeddings().weight[class_token(golden_pipeline, "man")]
    assert words.shape == (16, 2, 32)
    assert torch.equal(words[:, 1], known.expand(16, -1))
    assert torch.equal(words[0, 0], words[15, 0]) and 0.008 < float(words[0, 0].std()) < 0.018


def test_a_meaningless_class_word_is_refused(golden_pipeline):
    with pytest.raises(TokenError, match="means nothing"):
        class_token(golden_pipeline, " ")


def test_masked_loss_is_the_reference_formula():
    generator = torch.Generator().manual_seed(0)
    made, target = torch.randn(2, 4, 6, 6, generator=generator), torch.randn(2, 4, 6, 6, generator=generator)
    torch.testing.assert_close(masked_mse(made, target), (made - target).square().mean())
    # A mask of one channel counts an error of four: four times the mean per element, as the reference does.
    torch.testing.assert_close(masked_mse(made, target, torch.ones(2, 1, 6, 6)), 4 * masked_mse(made, target))
    half = torch.zeros(2, 1, 6, 6)
    half[..., :3] = 1
    torch.testing.assert_close(masked_mse(made, target, half), 4 * masked_mse(made[..., :3], target[..., :3]))


def test_noise_offset_shifts_whole_channels():
    latents = torch.zeros(2, 3, 64, 64)
    plain = offset_noise(latents, 0.0, torch.Generator().manual_seed(0))
    shifted = offset_noise(latents, 0.5, torch.Generator().manual_seed(0))
    shift = shifted - plain
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=1e-4, atol=1e-5)
    assert shift.abs().mean() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 3}, "unknown key 'stpes'; did you mean 'steps'"),
        ({"steps": 0}, "'steps'"),
        ({"unet_rate": float("nan")}, "'unet_rate'"),
        ({"name": "<cat>"}, "'name'"),
        ({"name": "Cat"}, "'name'"),
        ({"rank": "four"}, "'rank'"),
    ],
)
def test_settings_are_checked_when_made(change, message):
    with pytest.raises(SettingsError, match=message):
        make_settings({"name": "cat", "class_word": "cat", "data": "x", **change})
