"""Every verb keeps to the device it is given: run on one that refuses tensors of two devices (see simulated.py)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from mixofshow import MixOfShowPipeline, Region, fuse, load_base, tune
from mixofshow.concepts.delta import load_delta
from mixofshow.concepts.model import load_unfused
from mixofshow.errors import BaseModelError, SettingsError
from mixofshow.fusion.settings import FusionSettings
from mixofshow.sampling.drawing import open_pipeline
from tests.devices.simulated import MixedDevicesError

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
QUICK = {"steps": 1, "prompts": ("photo of a {}",), "picture_prompts": ("photo of a {}",)}
SMALL = {"width": 128, "height": 64, "num_inference_steps": 2, "seed": 0}


def regions(concepts, *, polygon=True):
    first, second = (concept.prompt for concept in concepts)
    where = {"polygon": ((64, 4), (124, 8), (100, 60)), "feather": 6} if polygon else {"box": (64, 0, 128, 64)}
    return [Region(f"a {first}", (0, 0, 64, 64)), Region(f"a {second}", **where)]


def same_pictures(found, expected):
    return abs(found - expected).max() < 1e-4


def test_what_is_simulated_refuses_what_cuda_refuses(simulated_gpu):
    there, here = torch.zeros(3, device="cuda", requires_grad=True), torch.zeros(3)
    with pytest.raises(MixedDevicesError):
        there + here
    with pytest.raises(MixedDevicesError):
        here[there.long()]
    with pytest.raises(TypeError, match="numpy"):
        there.detach().numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator(), device="cuda")
    with pytest.raises(RuntimeError, match="ordinal"):
        here.to("cuda:2")
    assert (there + torch.tensor(1.0)).device == torch.device("cuda:0")
    assert there[here.long()].is_cuda
    assert not simulated_gpu.waits
    (there.cpu() * here).sum().backward()
    assert there.grad.is_cuda
    assert simulated_gpu.waits.total() == 1


def test_what_is_simulated_of_apple_has_no_double_precision(simulated_mps):
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, device="mps").double()
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64).to("mps")


@pytest.mark.parametrize(
    "changed",
    [
        {"loss.attention_weight": 0.01, "words.density_weight": 1e-3, "loss.min_snr": 5.0, "unet.drop_kv": 0.5},
        {"method": "custom-diffusion", "prior.weight": 0.0, "pictures.crops": 0},
        {"gradient_checkpointing": True, "unet.orthogonal_slice": 0, "precision": "bf16"},
    ],
    ids=["masks", "custom-diffusion", "checkpointing"],
)
def test_tuning(changed, settings, gpu):
    tune(settings(**changed), load_base(GOLDEN_BASE, device="cuda"))


def test_tuning_on_the_second_gpu(settings, two_gpus):
    base = load_base(GOLDEN_BASE, device="cuda:1")
    tune(settings(), base)
    assert base.unet.device == base.text_encoder.device == base.vae.device == torch.device("cuda:1")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")], ids="-".join)
def test_tuning_on_another_device_than_before(devices, settings, gpu):
    for device in devices:
        tune(settings(steps=1), load_base(GOLDEN_BASE, device=device))


@pytest.mark.slow
def test_a_running_mean_is_resumed(settings, gpu, tmp_path):
    base, asked = load_base(GOLDEN_BASE, device="cuda"), settings(**{"optimizer.ema": 0.9, "save_every": 1, "steps": 3})

    def stop(step, total, info):
        if step == 2:
            raise KeyboardInterrupt

    tune(asked, base, folder=tmp_path / "run", progress=stop)
    tune(asked, base, folder=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"refit": 1, "prior": 0.1}, marks=pytest.mark.slow),
        {"guard": True, "max_memory": 1e-4, "mode": "independent"},
        {"method": "lbfgs", "options": {"iterations": 3}},
        {"method": "dare"},
    ],
    ids=["refit", "independent", "lbfgs", "dare"],
)
def test_fusing(changed, few, gpu, tmp_path):
    fused = fuse(few, load_base(GOLDEN_BASE, device="cuda"), FusionSettings(**{**QUICK, **changed}))
    fused.model.save_delta(tmp_path / "delta.safetensors", 4)


@pytest.mark.parametrize(
    "changed",
    [{"prior": 0.1, "leave_one_out": True}, {"method": "svd"}],
    ids=["gradient", "svd"],
)
def test_fusing_without_double_precision(changed, few, simulated_mps, tmp_path):
    base = load_base(GOLDEN_BASE, device="mps")
    fused = fuse(few, base, FusionSettings(**{**QUICK, **changed}))
    assert {weight.device.type for weight in fused.model.weights.values()} == {"mps"}
    fused.model.save_delta(tmp_path / "delta.safetensors", 4)
    load_delta(tmp_path / "delta.safetensors").weights(base)


@pytest.fixture
def folder(few, golden_pipeline, tmp_path):
    """A fused folder, made on the CPU."""
    fused = fuse(few, golden_pipeline, FusionSettings(**QUICK, method="average"))
    fused.model.save(tmp_path / "fused")
    return tmp_path / "fused"


@pytest.mark.parametrize(
    "how",
    [{"isolate": True, "attend": 0.1, "num_inference_steps": 3}, {"upscale": 1.5, "regional_lora": True}],
    ids=["isolate", "upscale"],
)
def test_sampling(how, folder, few, gpu):
    regional = bool(how.get("regional_lora"))
    draw = open_pipeline(str(folder), base=str(GOLDEN_BASE), regional_lora=regional, device="cuda")
    draw("a photo", regions=regions(few), **{**SMALL, **how})


def test_concepts_in_memory_draw_on_a_model_from_a_folder(folder, few, gpu):
    draw = MixOfShowPipeline.of(load_unfused(folder, base=GOLDEN_BASE, device="cuda"))
    draw("a photo", regions=regions(few), regional_lora=few, **SMALL)


@pytest.fixture
def average(few, golden_pipeline):
    """A pipeline of both concepts on a copy of the base, on the CPU."""
    return MixOfShowPipeline.of(fuse(few, copy.deepcopy(golden_pipeline), FusionSettings(**QUICK, method="average")))


@pytest.mark.parametrize("regional_lora", [False, True])
def test_a_model_that_is_offloaded_draws_the_same(regional_lora, few, average, gpu):
    there = regions(few, polygon=False)
    how = {**SMALL, "regional_lora": regional_lora, "output_type": "np"}
    expected = average("a photo", regions=there, **how)[0]
    average.enable_model_cpu_offload(device="cuda")
    for _ in range(2):  # the second time parts have been to and fro
        assert same_pictures(average("a photo", regions=there, **how)[0], expected)


def test_words_are_drawn_by_a_base_that_is_offloaded_layer_by_layer(few, golden_pipeline, gpu):
    draw = MixOfShowPipeline.single(copy.deepcopy(golden_pipeline), few[0], strength=0.0)
    draw.model = type(draw.model)(draw, draw.model.vocabulary)  # what nothing is changed in
    expected = draw(f"a {few[0].prompt}", output_type="np", **SMALL)[0]
    draw.enable_sequential_cpu_offload(device="cuda")
    assert same_pictures(draw(f"a {few[0].prompt}", output_type="np", **SMALL)[0], expected)


@pytest.mark.parametrize("regional_lora", [False, True])
def test_changes_of_layers_that_are_offloaded_one_by_one_are_refused(regional_lora, few, average, gpu):
    average.enable_sequential_cpu_offload(device="cuda")
    with pytest.raises(BaseModelError, match="offloaded.*enable_model_cpu_offload"):
        average("a photo", regions=regions(few), regional_lora=regional_lora, **SMALL)


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_neither_fusing_nor_tuning_takes_an_offloaded_base(how, few, settings, golden_pipeline, gpu):
    base = copy.deepcopy(golden_pipeline)
    getattr(base, how)(device="cuda")
    with pytest.raises(BaseModelError, match=r"fusing: .*offloaded; call remove_all_hooks\(\)"):
        fuse(few, base, FusionSettings(**QUICK))
    with pytest.raises(BaseModelError, match=r"tuning: .*offloaded; call remove_all_hooks\(\)"):
        tune(settings(), base)


def test_compiled_parts_are_seen_through(few, settings, golden_pipeline):
    base = copy.deepcopy(golden_pipeline)
    expected = MixOfShowPipeline.of(fuse(few, base, FusionSettings(**QUICK)))
    plain = expected("a photo", regions=regions(few), output_type="np", **SMALL)[0]
    tuned = tune(settings(steps=1), base)
    base.unet, base.text_encoder = (torch.compile(part, backend="eager") for part in (base.unet, base.text_encoder))
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes; what is new is how parts are wrapped
        draw = MixOfShowPipeline.of(fuse(few, base, FusionSettings(**QUICK)))
        assert same_pictures(draw("a photo", regions=regions(few), output_type="np", **SMALL)[0], plain)
        assert tune(settings(steps=1), base).hash == tuned.hash


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "cuda:x", "meta"])
def test_a_device_that_is_not_there_is_said(device):
    with pytest.raises(SettingsError, match=f"device '{device}'"):
        load_base(GOLDEN_BASE, device=device)


def test_a_step_waits_for_the_device_once(few, simulated_gpu):
    """It is asked in every step whether the latents are finite, and nothing else."""
    base, waits = load_base(GOLDEN_BASE, device="cuda"), []
    base.scheduler = EulerDiscreteScheduler.from_config(base.scheduler.config)
    draw = MixOfShowPipeline.single(base, few[0])
    for steps in (2, 6):
        simulated_gpu.waits.clear()
        draw("a photo", regions=regions(few[:1] * 2), **{**SMALL, "num_inference_steps": steps})
        waits.append(simulated_gpu.waits.total())
    assert waits[1] - waits[0] <= 4
