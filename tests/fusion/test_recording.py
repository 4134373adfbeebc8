"""Recording against brute force: all rows, collected by hooks of our own on copies of the model, in double precision."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional

from mixofshow.bases import memory
from mixofshow.bases.layers import cross_attentions, layer, lora_layers, matrix, tunable_layers
from mixofshow.concepts.adapters import tuned_weights
from mixofshow.concepts.prompts import layerwise, placeholder_vectors
from mixofshow.concepts.words import token_ids
from mixofshow.fusion import recording, statistics
from mixofshow.fusion.recording import Source, record
from mixofshow.fusion.settings import RecordingSettings
from mixofshow.fusion.statistics import LayerStatistics, input_of, parts

PROMPTS: dict[str, Any] = {"steps": 2, "prompts": ("photo of a {}", "{}"), "picture_prompts": ("photo of a {}",)}
FEW = RecordingSettings(**PROMPTS)
Rows = dict[str, list[Tensor]]
NOISY = (DDPMScheduler, EulerAncestralDiscreteScheduler)
"""Schedulers that add noise in every step."""
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guidance": {"guidance_scale": 5.0},
    "two pictures": {"picture_prompts": ("photo of a {}", "a {} on the street"), "seed": 5},
    "other texts": {"prompts": ("{}, and {} again", "a photo", "a long story about a {} that goes on and on")},
}


@pytest.fixture(scope="module")
def concept(random_concept):
    return random_concept("cat", seed=1)


@pytest.fixture(scope="module")
def fused(double_pipeline, random_concept):
    """Weights that are not the concept's own, of most layers that it changes."""
    weights = tuned_weights(double_pipeline, other := random_concept("dog", seed=2), list(other.deltas)[3:])
    return {name: weight.clone() for name, weight in weights.items()}


def stage(name: str) -> str:
    if name.startswith("text_encoder."):
        return "text"
    return "keys-and-values" if name.endswith((".attn2.to_k", ".attn2.to_v")) else "picture"


def model_with(pipeline: Any, weights: Mapping[str, Tensor]) -> Any:
    model = copy.deepcopy(pipeline)
    with torch.no_grad():
        for name, weight in weights.items():
            matrix(layer(model, name)).copy_(weight)
    return model


@contextlib.contextmanager
def collecting(model: Any, rows: Rows, wanted: str) -> Iterator[None]:
    """Inside, every row that layers of one stage see is collected, each layer for itself."""

    def hook(name: str) -> Callable[..., None]:
        def collect(module: Any, args: tuple[Tensor, ...]) -> None:
            if isinstance(module, nn.Conv2d):  # a convolution that copies what each place of the kernel sees
                width = module.weight[0].numel()
                copy = torch.eye(width).to(args[0]).view(width, *module.weight.shape[1:])
                args = (functional.conv2d(args[0], copy, stride=module.stride, padding=module.padding),)
            channels_last = args[0].permute(0, 2, 3, 1) if args[0].ndim == 4 else args[0]
            rows[name].append(channels_last.reshape(-1, channels_last.shape[-1]).double())

        return collect

    layers = {name: one for name, one in tunable_layers(model).items() if stage(name) == wanted}
    handles = [one.register_forward_pre_hook(hook(name)) for name, one in layers.items()]
    yield
    for handle in handles:
        handle.remove()


def ids_of(model: Any, source: Source, text: str, length: int | None = None) -> list[int]:
    first = model.text_encoder.get_input_embeddings().num_embeddings
    return token_ids(text, model.tokenizer, source.vocabulary, first, length)


def encode(model: Any, source: Source, ids: list[int]) -> Tensor:
    """One variant after another, (layers, tokens, dim)."""
    layers = len(cross_attentions(model.unet))
    if source.concept is None:
        return model.text_encoder(torch.tensor([ids])).last_hidden_state.repeat(layers, 1, 1)
    hidden = []
    for index in range(layers):
        with placeholder_vectors(model.text_encoder, source.concept.embeddings[:, index]):
            hidden.append(model.text_encoder(torch.tensor([ids])).last_hidden_state[0])
    return torch.stack(hidden)


@torch.no_grad()
def brute_force(source: Source, settings: RecordingSettings, model: Any) -> dict[str, Tensor]:
    """What the model's layers see, (rows, in) by layer, picture after picture."""
    rows: Rows = defaultdict(list)
    length = None if source.concept else model.text_encoder.config.max_position_embeddings
    for text in source.texts:
        with collecting(model, rows, "text"):
            encode(model, source, ids_of(model, source, text))
        ids = ids_of(model, source, text, length)
        first, end = model.text_encoder.get_input_embeddings().num_embeddings, model.tokenizer.eos_token_id
        telling = [place for place, one in enumerate(ids) if not source.concept or one >= first or one == end]
        for hidden, path in zip(encode(model, source, ids), cross_attentions(model.unet), strict=True):
            for part in ("to_k", "to_v"):
                rows[f"unet.{path}.{part}"].append(hidden[telling])
    for number, prompt in enumerate(source.pictures):
        _draw(source, settings, prompt, settings.seed + number, model, rows)
    return {name: torch.cat(some) for name, some in rows.items()}


def _draw(source: Source, settings: RecordingSettings, prompt: str, seed: int, model: Any, rows: Rows) -> None:
    guided = settings.guidance_scale > 1
    length = model.text_encoder.config.max_position_embeddings
    read = ["", prompt] if guided else [prompt]
    text = torch.stack([encode(model, source, ids_of(model, source, one, length)) for one in read])
    scheduler = type(model.scheduler).from_config(model.scheduler.config)
    scheduler.set_timesteps(settings.steps)
    size = model.unet.config.sample_size
    own = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, size, size, generator=own).double() * scheduler.init_noise_sigma
    noisy = {"generator": own} if type(scheduler) in NOISY else {}
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep).repeat(len(text), 1, 1, 1)
        with collecting(model, rows, "picture"), layerwise(model.unet):
            noise = model.unet(scaled, timestep, encoder_hidden_states=text).sample
        if guided:
            noise = noise[:1] + settings.guidance_scale * (noise[1:] - noise[:1])
        latents = scheduler.step(noise, timestep, latents, **noisy).prev_sample


def assert_moments(seen: Mapping[str, LayerStatistics], names: list[str], own: dict[str, Tensor]) -> None:
    assert set(seen) == {input_of(name) for name in names}
    for name in names:
        one, x = seen[input_of(name)], own[name]
        assert one.rows == len(x), name
        assert one.moments.dtype == torch.float64
        assert distance(one.moments, x.T @ x) < 1e-10, name


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def same(one: Mapping[str, LayerStatistics], other: Mapping[str, LayerStatistics]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].rows == other[name].rows
        and all(torch.equal(value, other[name].tensors()[kind]) for kind, value in one[name].tensors().items())
        for name in one
    )


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_moments_are_those_of_all_rows(options, double_pipeline, concept):
    settings = RecordingSettings(**PROMPTS | options)
    source, names = Source.of(concept, settings), list(tunable_layers(double_pipeline))
    own = model_with(double_pipeline, tuned_weights(double_pipeline, concept, concept.deltas))
    assert_moments(record(double_pipeline, source, names, settings), names, brute_force(source, settings, own))


def test_the_bases_own_prompts_are_read_whole_with_their_padding(double_pipeline):
    source, names = Source(None, ("", "a photo"), ("a photo",)), list(tunable_layers(double_pipeline))
    rows = brute_force(source, FEW, double_pipeline)
    length = double_pipeline.text_encoder.config.max_position_embeddings
    assert {len(rows[name]) for name in names if stage(name) == "keys-and-values"} == {2 * length}
    assert_moments(record(double_pipeline, source, names, FEW), names, rows)


def test_only_its_own_layers_are_the_concepts(double_pipeline, concept):
    names = [name for name in concept.deltas if stage(name) != "text"]
    own = {name for name in names if stage(name) == "keys-and-values"}
    source = Source.of(concept, FEW)
    model = model_with(double_pipeline, tuned_weights(double_pipeline, concept, own))
    seen = record(double_pipeline, source, names, FEW, own=own)
    assert_moments(seen, names, brute_force(source, FEW, model))


def test_guidance_doubles_the_rows_of_pictures_and_no_others(golden_pipeline, concept):
    names = list(lora_layers(golden_pipeline))
    plain, guided = (
        record(golden_pipeline, Source.of(concept, one), names, one)
        for one in (FEW, FEW.model_copy(update={"guidance_scale": 2.0}))
    )
    for name in names:
        times = 2 if stage(name) == "picture" else 1
        assert guided[input_of(name)].rows == times * plain[input_of(name)].rows, name


def test_pictures_add_up(double_pipeline, concept):
    prompts = ("photo of a {}", "a {} on the street", "{}")
    names = [name for name in concept.deltas if stage(name) == "picture"]

    def drawn(seed: int, *prompts: str) -> dict[str, LayerStatistics]:
        settings = RecordingSettings(steps=1, seed=seed, picture_prompts=prompts)
        return record(double_pipeline, Source.of(concept, settings), names, settings)

    together, apart = drawn(7, *prompts), [drawn(7 + number, prompt) for number, prompt in enumerate(prompts)]
    for name, one in together.items():
        assert one.rows == sum(other[name].rows for other in apart)
        assert distance(one.moments, sum(other[name].moments for other in apart)) < 1e-12, name


@pytest.mark.parametrize("width", [5, 256, 257, 1300])
def test_half_of_the_products_makes_all_moments(width):
    rows = torch.randn(2, 31, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counted = statistics.MomentAccumulator()
    for one in rows:
        counted.add("layer", one)
    seen, every = counted.seen()["layer"].moments, rows.flatten(0, 1)
    torch.testing.assert_close(seen, every.T @ every, rtol=1e-12, atol=1e-12)


def test_products_in_single_are_summed_in_double(golden_pipeline, concept):
    names, source = [name for name in concept.deltas if stage(name) == "picture"], Source.of(concept, FEW)
    exact, single = (record(golden_pipeline, source, names, FEW, exact=one) for one in (True, False))
    for name, one in single.items():
        assert one.moments.dtype == torch.float64
        assert 0 < distance(one.moments, exact[name].moments) < 1e-6, name


def test_products_are_exact_where_single_precision_is_not_single(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert statistics.MomentAccumulator(exact=False).exact

    def mixed() -> str:
        """What torch does where the precision was set in its newer way."""
        raise RuntimeError

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert statistics.MomentAccumulator(exact=False).exact


@pytest.mark.parametrize("size", [1.0, 1e14, 1e20])
def test_products_in_single_do_not_overflow(size):
    counted = statistics.MomentAccumulator(exact=False)
    counted.add("layer", torch.full((3, 4), size))
    expected = torch.full((4, 4), 3 * size**2, dtype=torch.float64)
    torch.testing.assert_close(counted.seen()["layer"].moments, expected, rtol=1e-6, atol=0)


def test_products_are_in_single_also_amid_autocast():
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    counted = statistics.MomentAccumulator(exact=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        counted.add("layer", rows)
    exact = rows.double()
    assert distance(counted.seen()["layer"].moments, exact.T @ exact) < 1e-6


def with_scheduler(pipeline: Any, kind: Any) -> Any:
    changed = copy.copy(pipeline)
    changed.scheduler = kind.from_config(pipeline.scheduler.config)
    return changed


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", NOISY)
def test_noise_that_is_added_on_the_way_is_each_pictures_own(scheduler, guidance, double_pipeline, concept, monkeypatch):
    """One at a time or side by side, each picture's noise comes from its own seed, at the start and in every step."""
    prompts = ("photo of a {}", "a {} on the street", "{}")
    settings = RecordingSettings(steps=3, picture_prompts=prompts, guidance_scale=guidance)
    pipeline, source = with_scheduler(double_pipeline, scheduler), Source.of(concept, settings)
    names = [name for name in concept.deltas if ".up_blocks.3." in name and stage(name) == "picture"][::4]
    own = model_with(pipeline, tuned_weights(pipeline, concept, concept.deltas))
    expected = brute_force(source, settings, own)
    drawn = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, args: drawn.append(len(args[0])))
    for at_once, batches in ((1, [1, 1, 1]), (2, [2, 1]), (4, [3])):
        monkeypatch.setattr(memory, "CELLS", at_once * pipeline.unet.config.sample_size**2)
        assert_moments(record(pipeline, source, names, settings), names, {name: expected[name] for name in names})
        assert drawn == [size * (1 if guidance == 1 else 2) for size in batches for _ in range(settings.steps)]
        drawn.clear()
    handle.remove()


def test_each_layer_alone_sees_what_it_sees_among_others(golden_pipeline, concept):
    names, source = list(lora_layers(golden_pipeline))[::11], Source.of(concept, FEW)
    whole = record(golden_pipeline, source, names, FEW)
    each = [record(golden_pipeline, source, [name], FEW) for name in names]
    assert same(whole, {name: seen for one in each for name, seen in one.items()})


@pytest.mark.parametrize("scheduler", NOISY)
def test_schedulers_that_draw_noise_draw_the_same_again(scheduler, golden_pipeline, concept):
    pipeline = with_scheduler(golden_pipeline, scheduler)
    names, source = [name for name in concept.deltas if ".up_blocks.3." in name][::6], Source.of(concept, FEW)
    state = torch.get_rng_state()
    whole = record(pipeline, source, names, FEW)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert same(whole, record(pipeline, source, names, FEW))


@pytest.mark.parametrize("budget", [None, 1.0, 8 * 16**2 * 2.5, 8 * 32**2 * 4, 1e12])
def test_parts_hold_each_layer_once_and_fit(budget, golden_pipeline):
    names = list(tunable_layers(golden_pipeline))
    widths = {name: matrix(layer(golden_pipeline, name)).shape[1] for name in names}
    groups = parts(names, widths, budget)
    assert [name for group in groups for name in group] == names

    def size(group: list[str]) -> int:
        return sum({input_of(name): 8 * widths[name] ** 2 for name in group}.values())

    assert budget is None or all(size(group) <= budget for group in groups if len(group) > 1)
    for group, following in itertools.pairwise(groups):
        assert size([*group, following[0]]) > budget  # no group is left before it is full
    assert (len(groups) == 1) is (budget in (None, 1e12))


def test_kept_inputs_are_the_rows_of_the_moments(double_pipeline, concept):
    names, source = list(lora_layers(double_pipeline)), Source.of(concept, FEW)
    own = model_with(double_pipeline, tuned_weights(double_pipeline, concept, concept.deltas))
    rows = brute_force(source, FEW, own)
    seen = record(double_pipeline, source, names, FEW, keep_inputs=True)
    for name in names:
        one = seen[input_of(name)]
        assert len(one.inputs) == one.rows
        assert distance(one.inputs.T @ one.inputs, one.moments) < 1e-12, name
        assert distance(one.inputs, rows[name]) < 1e-10, name
    assert all(one.inputs is None for one in record(double_pipeline, source, names[:3], FEW).values())


def test_the_size_of_chunks_changes_nothing(golden_pipeline, concept, monkeypatch):
    names, source = list(concept.deltas)[::5], Source.of(concept, FEW)
    whole = record(golden_pipeline, source, names, FEW)
    assert max(one.rows for one in whole.values()) > 100
    monkeypatch.setattr(statistics, "CHUNK", 7)
    for name, one in record(golden_pipeline, source, names, FEW).items():
        assert one.rows == whole[name].rows
        for kind, value in one.tensors().items():
            assert distance(value, whole[name].tensors()[kind]) < 1e-12, (name, kind)


class BreaksOffError(Exception):
    """What stops a recording here."""


@pytest.mark.parametrize("where", ["nowhere", "text_encoder", "unet"])
def test_the_pipeline_is_left_as_it_was(where, golden_pipeline, concept):
    def weights() -> dict[str, Tensor]:
        return {**golden_pipeline.unet.state_dict(prefix="unet."), **golden_pipeline.text_encoder.state_dict()}

    before = {name: value.clone() for name, value in weights().items()}
    table, modules = golden_pipeline.text_encoder.get_input_embeddings(), [*golden_pipeline.unet.modules()]
    hooks = sum(len(module._forward_pre_hooks) for module in modules)
    golden_pipeline.scheduler.set_timesteps(FEW.steps + 3)
    timesteps = golden_pipeline.scheduler.timesteps.clone()
    calls = 0

    def break_off(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            assert any(not torch.equal(value, before[name]) for name, value in weights().items())  # it does change
            raise BreaksOffError

    handle = getattr(golden_pipeline, where).register_forward_pre_hook(break_off) if where != "nowhere" else None
    with contextlib.nullcontext() if handle is None else pytest.raises(BreaksOffError):
        record(golden_pipeline, Source.of(concept, FEW), list(concept.deltas), FEW)
    if handle is not None:
        handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in weights().items())
    assert golden_pipeline.text_encoder.get_input_embeddings() is table
    assert torch.equal(golden_pipeline.scheduler.timesteps, timesteps)
    assert sum(len(module._forward_pre_hooks) for module in modules) == hooks


def test_stages_are_the_papers(golden_pipeline):
    names = list(tunable_layers(golden_pipeline))
    assert {name: recording.stage_of(name) for name in names} == {name: stage(name) for name in names}
