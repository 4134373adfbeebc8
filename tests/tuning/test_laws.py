"""What tuning may and may not change."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from mixofshow.bases.layers import cross_attentions, layer, lora_layers, matrix
from mixofshow.concepts.changes import Full, LowRank
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.model import with_concept
from mixofshow.errors import SettingsError, TokenError
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.tuning.adapters import (
    ADAPTER,
    METHODS,
    class_token,
    initial_words,
    lora_adapters,
    switched_off,
)
from mixofshow.tuning.batches import BucketSampler, LatentDataset
from mixofshow.tuning.dataset import read_folder
from mixofshow.tuning.losses import masked_mse, min_snr_weights, negative_log_density, noise_scheduler, offset_noise
from mixofshow.tuning.run import make_optimizer
from mixofshow.tuning.settings import make_settings
from mixofshow.tuning.trainer import tune
from tests.conftest import pictures_in, short_run


@pytest.fixture
def make(tmp_path):
    """`make(key=value, …)`: settings of three steps on two small pictures."""
    data = pictures_in(tmp_path / "pictures", "red", "blue", size=(20, 16))
    # To draw a prior takes longer than all the rest.
    quick = {"base": "tiny", "steps": 3, "batch_size": 2, "pictures.size": 64, "prior.data": data}
    rates = {"words.rate": 0.01, "text_encoder.rate": 0.01, "unet.rate": 0.01}
    return short_run(data, **quick, **rates)


@pytest.fixture
def settings(make):
    return make()


def _state(pipeline):
    parts = (pipeline.unet, pipeline.text_encoder)
    return [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_bit_equal_afterwards(golden_pipeline, make, method):
    before = _state(golden_pipeline)
    tune(make(method=method), golden_pipeline)
    for old, new in zip(before, _state(golden_pipeline), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


DRAWN = {"num_inference_steps": 2, "width": 32, "height": 32, "seed": 0}
WORDS = {"ed-lora": (2, 16), "lora": (2, 1), "p-plus": (1, 16), "textual-inversion": (1, 1), "custom-diffusion": (2, 1)}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_what_it_says(golden_pipeline, make, method):
    start = initial_words(golden_pipeline, make(method=method), torch.Generator().manual_seed(0))()
    # The middle of the UNet must see more than one place, or it has nothing to attend to.
    concept = tune(make(method=method, **{"pictures.size": 128, "steps": 2, "batch_size": 1}), golden_pipeline)
    assert concept.embeddings.shape[:2] == WORDS[method]
    moved = (concept.embeddings.transpose(0, 1) - start).abs().amax((0, 2)) > 1e-3
    assert moved.tolist() == ([True, False] if method == "custom-diffusion" else [True] * WORDS[method][0])
    changed = {name for name, delta in concept.deltas.items() if delta.matrix().any()}
    every = set(lora_layers(golden_pipeline))
    cross = {name for name in every if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert changed == {"ed-lora": every, "lora": every, "custom-diffusion": cross}.get(method, set())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_saved_loaded_fused_and_drawn(golden_pipeline, make, method, tmp_path):
    concept = tune(make(method=method), golden_pipeline)
    concept.save(tmp_path / "thing.safetensors")
    loaded = load_concept(tmp_path / "thing.safetensors", golden_pipeline)
    assert loaded.hash == concept.hash
    own, fused = with_concept(golden_pipeline, loaded).weights, fuse([loaded], golden_pipeline).model.weights
    assert own.keys() == fused.keys()
    assert all(torch.allclose(own[name], fused[name], atol=1e-5) for name in own)
    draw = MixOfShowPipeline.single(golden_pipeline, loaded)
    draw("a <thing>", num_inference_steps=1, width=32, height=32)


def test_targets_say_which_layers_are_changed(golden_pipeline, make):
    everything = {"unet.targets": "projections", "text_encoder.targets": "layers", "pictures.size": 128, "steps": 2}
    wide = tune(make(**everything), golden_pipeline)
    names = set(wide.deltas)
    assert names > set(lora_layers(golden_pipeline))
    for ending in ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2"):
        assert any(name.endswith(ending) for name in names), ending
    assert all(isinstance(delta, LowRank) and delta.matrix().any() for delta in wide.deltas.values())
    assert fuse([wide], golden_pipeline).model.weights.keys() == names


def test_keys_and_values_alone_leave_all_else_of_the_unet(golden_pipeline, make):
    concept = tune(make(**{"unet.targets": "keys-and-values"}), golden_pipeline)
    changed = {name for name in concept.deltas if name.startswith("unet.")}
    assert changed == {name for name in lora_layers(golden_pipeline) if name.endswith(("attn2.to_k", "attn2.to_v"))}


def test_a_full_change_is_stored_in_two_factors_when_that_says_the_same(golden_pipeline, make):
    one_step = make(method="custom-diffusion", steps=1, **{"prior.weight": 0, "batch_size": 1})
    kinds = {type(delta) for delta in tune(one_step, golden_pipeline).deltas.values()}
    assert kinds <= {LowRank, Full} and Full in kinds  # Adam's first step is a matrix of signs: no factors are smaller


def test_training_nothing_changes_nothing(golden_pipeline, make):
    still = make(**{"words.rate": 1e-30, "text_encoder.rate": 0, "unet.rate": 0})  # all three 0 are refused
    concept = tune(still, golden_pipeline)
    start = initial_words(golden_pipeline, still, torch.Generator().manual_seed(0))()
    assert torch.equal(concept.embeddings.transpose(0, 1), start.half().float())
    assert not any(delta.matrix().any() for delta in concept.deltas.values())


OPTIONS = {
    "flips and cuts": {"pictures.flip": True, "pictures.crops": 3},
    "a new cut every step": {"pictures.crops": 0},
    "padding": {"pictures.fit": "pad"},
    "buckets": {"pictures.fit": "bucket", "pictures.size": 192, "steps": 1},
    "min-SNR": {"loss.min_snr": 5},
    "another prediction": {"loss.prediction": "v_prediction"},
    "noise offset": {"loss.noise_offset": 0.5},
    "captions": {"captions.templates": "object", "captions.dropout": 0.5},
    "density": {"words.density_weight": 2e-3},
    "keys and values dropped": {"unet.drop_kv": 1.0},
    "a slice of the orthogonal basis": {"unet.orthogonal_slice": 1},
    "accumulation": {"optimizer.accumulate": 2},
    "Prodigy": {"optimizer.name": "prodigy", "words.rate": 1, "text_encoder.rate": 1, "unet.rate": 1},
    "warm-up": {"optimizer.warmup": 2},
    "cosine": {"optimizer.schedule": "cosine"},
    "constant": {"optimizer.schedule": "constant"},
    "running mean": {"optimizer.ema": 0.5},
    "prior": {"prior.weight": 1.0},
    "a prior that is drawn": {"prior.weight": 1.0, "prior.data": None, "prior.count": 1},
    "bf16": {"precision": "bf16"},
    "clipping": {"optimizer.max_grad_norm": 1e-3, "optimizer.weight_decay": 0.0, "optimizer.beta2": 0.5},
    "epochs": {"epochs": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_works_and_tells(golden_pipeline, make, option, plain_hash=[]):  # noqa: B006 - tuned once for all
    if not plain_hash:
        plain_hash.append(tune(make(), golden_pipeline).hash)
    assert tune(make(**OPTIONS[option]), golden_pipeline).hash != plain_hash[0]


def test_pictures_of_two_shapes_go_into_two_buckets(golden_pipeline, make, tmp_path):
    Image.new("RGB", (40, 20), "green").save(tmp_path / "pictures" / "2.png")
    settings = make(**{"pictures.fit": "bucket", "pictures.size": 192})
    examples = read_folder(settings.data, instance_prompt="a <thing>")
    source = LatentDataset(examples, settings.pictures, golden_pipeline, seed=0)
    assert sorted(map(sorted, source.groups)) == [[0, 1], [2]]
    order = BucketSampler(source.groups, 2, batches=30, seed=0)
    shapes = {source.draw(order.batch(number), torch.Generator()).latents.shape[-2:] for number in range(30)}
    assert len(shapes) == 2


def test_every_picture_comes_once_before_any_comes_twice():
    order = BucketSampler([list(range(7))], 3, batches=70, seed=0)
    stream = [index for number in range(70) for index in order.batch(number)]
    for start in range(0, 210, 7):
        assert sorted(stream[start : start + 7]) == list(range(7))
    assert stream[:7] != stream[7:14]


def test_recomputing_activations_changes_no_result(golden_pipeline, make):
    plain = tune(make(), golden_pipeline)
    thrifty = tune(make(gradient_checkpointing=True), golden_pipeline)
    assert torch.allclose(plain.embeddings, thrifty.embeddings, atol=1e-3)
    assert not golden_pipeline.text_encoder.training and not golden_pipeline.unet.is_gradient_checkpointing


def test_without_keys_and_values_they_stay_the_bases(golden_pipeline, make):
    concept = tune(make(**{"unet.drop_kv": 1.0, "pictures.size": 128, "steps": 2}), golden_pipeline)
    for name, delta in concept.deltas.items():
        assert bool(delta.matrix().any()) != name.endswith(("attn2.to_k", "attn2.to_v")), name


def _slices(number, **others):
    return {"unet.orthogonal_slice": number, "text_encoder.orthogonal_slice": number, **others}


def _factors(change):
    layer = change.wrapper
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def test_slices_of_the_orthogonal_basis_cannot_meet(golden_pipeline, make):
    everything = {"unet.targets": "projections", "text_encoder.targets": "layers"}
    downs = []
    for number in (0, 1, 3):
        with lora_adapters(golden_pipeline, make(**_slices(number, **everything))) as changes:
            downs.append({name: _factors(change)[0].detach().flatten(1) for name, change in changes.items()})
    for name in downs[0]:
        rows = torch.cat([one[name] for one in downs]).double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), rtol=0, atol=1e-6)


def test_all_clients_have_the_same_basis(golden_pipeline, make):
    def rows(**settings):
        with lora_adapters(golden_pipeline, make(**settings)) as changes:
            return {name: _factors(change)[0].detach() for name, change in changes.items()}

    one, other = rows(**_slices(1), seed=0), rows(**_slices(1), seed=5, name="other")
    assert all(torch.equal(down, other[name]) for name, down in one.items())
    assert len({tuple(down.flatten().tolist()) for down in one.values()}) == len(one)  # each layer has its own
    wide = rows(**_slices(0, **{"unet.rank": 8, "text_encoder.rank": 8}))
    assert all(torch.allclose(down, wide[name][4:], atol=1e-6) for name, down in one.items())


def test_in_a_slice_only_the_up_matrix_is_trained(golden_pipeline, make):
    with lora_adapters(golden_pipeline, make(**_slices(2))) as changes:
        with switched_off(changes.values()):
            pass  # after which peft would train all of an adapter
        for change in changes.values():
            down, up = _factors(change)
            assert not down.requires_grad and [one is up for one in change.parameters()] == [True]
        start = {name: change.finished().down for name, change in changes.items()}
    concept = tune(make(**_slices(2, **{"pictures.size": 128, "steps": 2, "unet.drop_kv": 0.5})), golden_pipeline)
    for name, delta in concept.deltas.items():
        assert torch.equal(delta.down, start[name]), name
        assert delta.up.any(), name


def test_concepts_in_different_slices_are_fused_by_their_sum(golden_pipeline, make):
    size = {"pictures.size": 128, "steps": 2}
    concepts = [tune(make(name=name, **_slices(k, **size)), golden_pipeline) for k, name in enumerate(("one", "two"))]
    settings = FusionSettings(method="orthogonal", steps=1)
    fused = fuse(concepts, golden_pipeline, settings).model.weights
    for name, weight in fused.items():
        change = weight - matrix(layer(golden_pipeline, name))
        deltas = [concept.deltas[name] for concept in concepts]
        torch.testing.assert_close(change, sum(delta.matrix() for delta in deltas), rtol=0, atol=1e-6)
        for delta in deltas:  # on what a concept's change reads, there is nothing of the other (but half precision)
            torch.testing.assert_close(change @ delta.down.T, delta.matrix() @ delta.down.T, rtol=0, atol=1e-4)
    with pytest.raises(SettingsError, match=r"unet\.orthogonal_slice"):
        # Of another seed, since a double of the first would not be counted.
        other = tune(make(name="two", seed=7, **_slices(0, **size)), golden_pipeline)
        fuse([concepts[0], other], golden_pipeline, settings)


def test_a_slice_must_fit_into_every_layer(golden_pipeline, make):
    before = _state(golden_pipeline)
    with pytest.raises(SettingsError, match=r"orthogonal_slice: 4 at rank 4 needs 20 inputs, layer 'unet\..* has 16"):
        tune(make(**_slices(4)), golden_pipeline)
    assert _state(golden_pipeline)[0].keys() == before[0].keys()


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
    for secret in (b"private", str(tmp_path).encode(), b".png"):
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
        drawn.append((concept, draw(concept.prompt, **DRAWN)[0].tobytes()))

    plain = tune(settings, golden_pipeline)
    watched = tune(settings.model_copy(update={"preview_every": 2}), golden_pipeline, preview=preview)
    assert watched.hash == plain.hash
    ((concept, picture),) = drawn
    again = MixOfShowPipeline.single(golden_pipeline, concept)(concept.prompt, **DRAWN)
    assert again[0].tobytes() == picture


def test_words_stop_at_the_norm_limit(golden_pipeline, make):
    stopped = tune(make(**{"words.norm_limit": 1e-6}), golden_pipeline)
    one_step = tune(make(**{"words.norm_limit": 1e-6, "unet.rate": 0, "text_encoder.rate": 0}), golden_pipeline)
    assert torch.equal(stopped.embeddings, one_step.embeddings)
    assert not torch.equal(stopped.embeddings, tune(make(), golden_pipeline).embeddings)


def test_words_start_random_and_as_the_class_word(golden_pipeline, make):
    words = initial_words(golden_pipeline, make(), torch.Generator().manual_seed(0))().detach()
    known = golden_pipeline.text_encoder.get_input_embeddings().weight[class_token(golden_pipeline.tokenizer, "man")]
    assert words.shape == (len(cross_attentions(golden_pipeline.unet)), 2, 32)
    assert torch.equal(words[:, 1], known.expand(16, -1))
    assert torch.equal(words[0, 0], words[15, 0]) and 0.008 < float(words[0, 0].std()) < 0.018


def test_min_snr_weights_in_closed_form(golden_pipeline, make):
    for prediction, extra in (("epsilon", 0), ("v_prediction", 1)):
        scheduler = noise_scheduler(golden_pipeline, make(**{"loss.prediction": prediction}).loss)
        timesteps = torch.tensor([0, 500, 999])
        kept = scheduler.alphas_cumprod[timesteps]
        snr = kept / (1 - kept)
        expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + extra)
        torch.testing.assert_close(min_snr_weights(scheduler, timesteps, 5.0), expected)


def test_density_draws_far_vectors_to_the_vocabulary():
    table = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    far = torch.full((1, 1, 8), 10.0, requires_grad=True)
    loss = negative_log_density(far, table)
    loss.backward()
    assert bool((far.grad > 0).all())  # going down leads back to the middle
    assert loss.item() > float(negative_log_density(torch.zeros(1, 1, 8), table))


def test_a_meaningless_class_word_is_refused(golden_pipeline):
    with pytest.raises(TokenError, match="means nothing"):
        class_token(golden_pipeline.tokenizer, " ")


def test_masked_loss_is_the_reference_formula():
    generator = torch.Generator().manual_seed(0)
    made, target = torch.randn(2, 4, 6, 6, generator=generator), torch.randn(2, 4, 6, 6, generator=generator)
    mask = torch.ones(2, 1, 6, 6)
    # A mask of one channel counts an error of four: four times the mean per element, as the reference does.
    torch.testing.assert_close(masked_mse(made, target, mask), 4 * (made - target).square().mean())
    mask[..., 3:] = 0
    torch.testing.assert_close(masked_mse(made, target, mask), 4 * (made - target)[..., :3].square().mean())


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
        ({"unet.rate": float("nan")}, "'unet.rate'"),
        ({"unet.rnk": 3}, "unknown key 'unet.rnk'; did you mean 'unet.rank'"),
        ({"unet": {"rank": 0}}, "'unet.rank'"),
        ({"method": "lora+"}, "'method'"),
        ({"name": "<cat>"}, "'name'"),
        ({"name": "Cat"}, "'name'"),
        ({"unet.rank": "four"}, "'unet.rank'"),
        ({"unet.orthogonal_slice": -1}, "'unet.orthogonal_slice'"),
    ],
)
def test_settings_are_checked_when_made(change, message):
    with pytest.raises(SettingsError, match=message):
        make_settings({"name": "cat", "class_word": "cat", "data": "x", **change})


def test_a_missing_optimizer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # importing it fails
    settings = make_settings({"name": "cat", "class_word": "cat", "data": "x", "optimizer.name": "adamw8bit"})
    with pytest.raises(SettingsError, match="pip install bitsandbytes"):
        make_optimizer(settings.optimizer, [])
