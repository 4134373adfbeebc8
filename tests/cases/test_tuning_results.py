"""What silently made another result of tuning than was asked for: B11, B16, B17, B20, B27, B31, B33, B34."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from peft import LoraConfig

from mixofshow import make_settings, tune
from mixofshow.bases.loading import USUAL_GUIDANCE
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BaseModelError, ResourceError, SettingsError
from mixofshow.progress import silent
from mixofshow.tuning import losses
from mixofshow.tuning.adapters import initial_words
from mixofshow.tuning.batches import prior_examples
from mixofshow.tuning.losses import Batch, Pictures, TrainingLoss
from mixofshow.tuning.settings import TuningSettings, with_presets
from tests.conftest import pictures_in

QUICK = {"steps": 1, "batch_size": 1, "pictures.size": 64}


@pytest.fixture
def data(tmp_path):
    """A folder of one picture."""
    return pictures_in(tmp_path / "thing", "red", size=(20, 16))


@pytest.mark.parametrize("base", [None, "emojiland"])
def test_rates_and_the_bases_name_are_those_of_the_pipeline(golden_pipeline, data, base):
    """B16: Emojiland's rates were given to every base, by `make_settings` though not by `TuningSettings`."""
    table = {"name": "thing", "class_word": "man", "data": data, **({"base": base} if base else {})}
    for settings in (make_settings({**table, **QUICK}), make_settings(table).model_copy(update={"steps": 1})):
        info = tune(settings, golden_pipeline).info
        assert info.base == "pipeline"  # the golden base's folder
        assert [info.settings[f"{one}.rate"] for one in ("words", "text_encoder", "unet")] == [1e-3, 1e-5, 1e-4]


def test_presets_lie_below_what_was_given():
    given = {"name": "thing", "class_word": "dog", "data": "x", "unet.rate": 0.5, "method": "p-plus", "steps": 1000}
    for settings in (make_settings(given), TuningSettings(**{k: v for k, v in given.items() if k != "unet.rate"})):
        found = with_presets(settings, "emojiland")
        assert (found.steps, found.text_encoder.rate, found.words.norm_limit) == (1000, 3e-4, 1e4)
        assert with_presets(settings, "other").text_encoder.rate == 1e-5
    assert with_presets(make_settings(given), "emojiland").unet.rate == 0.5


def test_tune_is_called_with_settings_or_without(golden_pipeline, data):
    keys = {"name": "thing", "class_word": "man", **QUICK}
    expected = tune(make_settings({**keys, "data": data}), golden_pipeline).hash
    assert tune(golden_pipeline, data, **keys).hash == expected
    assert tune(golden_pipeline, data=str(data), **keys).hash == expected
    with pytest.raises(SettingsError, match="unknown key 'stepz'; did you mean 'steps'"):
        tune(golden_pipeline, data, name="thing", class_word="man", stepz=3)
    with pytest.raises(SettingsError, match="tune: steps beside settings"):
        tune(make_settings({**keys, "data": data}), golden_pipeline, steps=3)


def test_a_base_that_diffusers_loaded_leaves_no_path_in_the_file(golden_pipeline, data, monkeypatch):
    monkeypatch.setattr(golden_pipeline, "_internal_dict", {**golden_pipeline.config, "_name_or_path": "/home/me/mine"})
    assert tune(golden_pipeline, data, name="thing", class_word="man", **QUICK).info.base == "mine"


def _loss(pipeline, **changed):
    settings = make_settings({"name": "thing", "class_word": "man", "data": "x", **changed})
    return TrainingLoss(pipeline, initial_words(pipeline, settings, torch.Generator().manual_seed(0)), {}, settings, [])


def _batch(masks, ids=()):
    """Noise of 1 in two pictures, (2, 4, 2, 2)."""
    ones = torch.ones(2, 4, 2, 2)
    pictures = Pictures(ones, masks, torch.ones(2, 1, 2, 2), torch.tensor([True, True]))
    return Batch(pictures, ones, torch.tensor([1, 2]), (torch.tensor(ids),))


def test_the_scale_of_the_loss_is_the_same_with_masks_and_without(golden_pipeline):
    """B20: the same error counted four times as much in every picture of a batch in which one had a mask."""
    half = torch.tensor([1.0, 0.0]).expand(2, 1, 2, 2)
    losses = [
        _loss(golden_pipeline)._denoising_loss(torch.zeros(2, 4, 2, 2), _batch(one))
        for one in (torch.ones(2, 1, 2, 2), half, torch.cat([half[:1], torch.ones(1, 1, 2, 2)]))
    ]
    assert [float(one) for one in losses] == [4.0, 4.0, 4.0]


def test_the_class_word_is_found_wherever_and_however_often_it_stands(golden_pipeline, monkeypatch):
    """B33: the class word was the last of the first words that all captions have, of equal ones any."""
    seen = []
    monkeypatch.setattr(losses, "words_attention", lambda maps, positions: seen.append(positions) or {})
    ready, first = _loss(golden_pipeline), _loss(golden_pipeline).first_id
    one, two = first, first + 1
    ready._attention_loss([], _batch(torch.ones(2, 1, 2, 2), [[5, one, two, one, two], [one, two, 5, 5, 5]]))
    assert seen.pop().tolist() == [[1, 2], [0, 1]]
    ready._attention_loss([], _batch(torch.ones(2, 1, 2, 2), [[5, one, 5, 5, 5], [5, 5, one, two, 5]]))
    assert seen.pop().tolist() == [[2, 3]]  # a caption with half of the concept says nothing of its class word


def test_no_random_state_of_any_device_is_left_changed(golden_pipeline, data, monkeypatch):
    """B31: all devices were seeded, and the CPU's state alone was put back."""
    seeded, before = [], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    tune(golden_pipeline, data, name="thing", class_word="man", **QUICK)
    assert not seeded and torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_programs_own_accelerator_goes_on_working(golden_pipeline, data, fresh_accelerate):
    """B17: it said that its state "cannot be changed"."""
    own = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=3)

    def look(*_):
        assert own.mixed_precision == "bf16"

    tune(golden_pipeline, data, name="thing", class_word="man", **QUICK, progress=look)
    assert (own.mixed_precision, own.gradient_accumulation_steps) == ("bf16", 3)
    assert Accelerator(mixed_precision="bf16", cpu=True).state.mixed_precision == "bf16"


def test_tuning_is_where_its_pipeline_is(golden_pipeline, data, fresh_accelerate):
    """B34: a process that had begun on one device stayed there."""
    PartialState(cpu=True).device = torch.device("meta")
    devices = []
    look = lambda *_: devices.append(PartialState().device)  # noqa: E731
    tune(golden_pipeline, data, name="thing", class_word="man", **QUICK, progress=look)
    assert devices == [golden_pipeline.device] and PartialState().device.type == "meta"


def test_a_base_with_somebodys_lora_is_refused_and_left_alone(golden_pipeline, data):
    """B11: the adapter was taken off for good, and the file's fingerprint was that of no base."""
    golden_pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "theirs")
    try:
        before = golden_pipeline.get_list_adapters()
        with pytest.raises(
            BaseModelError, match=r"tuning: the pipeline has adapters attached \(theirs\); take them off"
        ):
            tune(golden_pipeline, data, name="thing", class_word="man", **QUICK)
        assert golden_pipeline.get_list_adapters() == before == {"unet": ["theirs"]}
    finally:
        golden_pipeline.unload_lora_weights()


def test_a_base_that_is_offloaded_is_refused(golden_pipeline, data):
    hook = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(golden_pipeline.unet, hook)
    try:
        with pytest.raises(BaseModelError, match=r"tuning: unet: offloaded; call remove_all_hooks\(\)"):
            tune(golden_pipeline, data, name="thing", class_word="man", **QUICK)
    finally:
        remove_hook_from_module(golden_pipeline.unet)


def test_pictures_of_the_class_word_are_drawn_as_the_base_draws_best(monkeypatch):
    """B27: they were drawn with diffusers' own guidance; pictures that are not finite went into training as black."""
    asked, drawn = [], torch.zeros(1, 8, 8, 3)

    class Base(SimpleNamespace):
        def __call__(self, prompts, *, guidance_scale, **_):
            asked.append(guidance_scale)
            return SimpleNamespace(images=drawn.numpy())

    unet, vae = SimpleNamespace(config=SimpleNamespace(sample_size=8)), SimpleNamespace(use_slicing=False)
    parts = {"unet": unet, "vae": vae, "vae_scale_factor": 1}
    base = Base(config={}, image_processor=SimpleNamespace(numpy_to_pil=list), **parts)
    settings = make_settings({"name": "x", "class_word": "man", "data": "x", "prior.weight": 1, "prior.count": 1})
    assert len(prior_examples(settings, base, silent)) == 1 and asked == [USUAL_GUIDANCE]
    monkeypatch.setattr(ConceptModel, "usual_guidance", 2.0)
    prior_examples(settings, base, silent)
    assert asked[1] == 2.0
    drawn[0, 0] = float("nan")
    with pytest.raises(ResourceError, match="not finite"):
        prior_examples(settings, base, silent)
