"""A stranger's model folder: whatever it says of itself, it is refused in one line at once, and no pickle is opened.

Covers F30, F32, F35, and cases 19 and 27.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixofshow.bases.loading import load_base
from mixofshow.errors import BaseModelError

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
UNET, VAE, TEXT = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(tmp_path: Path, golden_pipeline: Any) -> Path:  # so that importing the libraries counts as nobody's time
    shutil.copytree(GOLDEN_BASE, tmp_path / "base")
    return tmp_path / "base"


def refused(base: Path | str, message: str, **options: Any) -> None:
    started = time.monotonic()
    with pytest.raises(BaseModelError, match=message) as error:
        load_base(base, **options)
    assert str(error.value).startswith(f"{base}: ") and str(error.value).isprintable()
    assert len(str(error.value).removeprefix(str(base))) < 300
    assert time.monotonic() - started < 5


VALUES = [
    (SCHEDULER, "num_train_timesteps", 10**9, "expected whole numbers from 1 to 10000, found 1000000000"),
    (SCHEDULER, "num_train_timesteps", 0, "from 1 to 10000"),
    (SCHEDULER, "num_train_timesteps", -1, "from 1 to 10000"),
    (SCHEDULER, "num_train_timesteps", "os", "from 1 to 10000"),
    (SCHEDULER, "beta_schedule", "x", "could not be loaded as a base model .x is not implemented"),
    (SCHEDULER, "beta_end", 1e308, "'beta_end': expected numbers above 0, at most 1"),
    (SCHEDULER, "trained_betas", [None], "'trained_betas'"),
    (SCHEDULER, "prediction_type", "x", "prediction_type given as x"),
    (SCHEDULER, "timestep_spacing", "x", "x is not supported"),
    (SCHEDULER, "clip_sample", {"a": 1}, "'clip_sample': expected such as True"),
    (UNET, "layers_per_block", 10**6, "from 1 to 16, found 1000000"),
    (UNET, "layers_per_block", [10**6] * 4, "from 1 to 16"),
    (UNET, "attention_head_dim", 0, "from 1 to 1024"),
    (UNET, "sample_size", 0, "from 1 to 8192"),
    (UNET, "sample_size", -1, "from 1 to 8192"),
    (UNET, "sample_size", [64, 64], "'sample_size': not to be a list of 2"),
    (UNET, "block_out_channels", [16] * 1000, "not to be a list of 1000"),
    (UNET, "act_fn", 3, "'act_fn': expected such as silu"),
    (UNET, "act_fn", "\x1b[31m", "could not be loaded"),
    (UNET, "norm_eps", "x", "'norm_eps'"),
    (UNET, "dual_cross_attention", True, "which its config.json asks for|could not be loaded"),
    (UNET, "cross_attention_dim", 40, "could not be loaded|cross_attention_dim"),
    (UNET, "down_block_types", ["os.system"] * 4, "could not be loaded"),
    (VAE, "latent_channels", 10**5, "from 1 to 64"),
    (VAE, "layers_per_block", "", "from 1 to 16"),
    (TEXT, "num_hidden_layers", 10**5, "from 1 to 128"),
    (TEXT, "vocab_size", 10**10, "from 1 to 1048576"),
    (TEXT, "hidden_size", None, "'hidden_size': expected such as 512, found null"),
    (TEXT, "layer_norm_eps", None, "'layer_norm_eps': expected such as"),
    (TEXT, "eos_token_id", [1, 2], "'eos_token_id': not to be a list of 2"),
    ("tokenizer/tokenizer_config.json", "model_max_length", {"a": 1}, "could not be loaded"),
    (UNET, "sample_size", None, "sample_size: expected a number, found null"),
    (TEXT, "hidden_act", "x", "could not be loaded"),
    (INDEX, "unet", 5, "expected a library and a class, found 5"),
    (INDEX, "unet", None, "has no unet"),
    (INDEX, "unet", ["os", "system"], "expected UNet2DConditionModel of diffusers, found system of os"),
    (INDEX, "unet", ["unet", "Unet"], "found Unet of unet"),
    (INDEX, "text_encoder", ["transformers", "LlamaForCausalLM"], "found LlamaForCausalLM"),
    (INDEX, "scheduler", ["diffusers", "NoScheduler"], "diffusers has no NoScheduler"),
    (INDEX, "feature_extractor", 1.5, "could not be loaded"),
    (INDEX, "_class_name", "FluxPipeline", "FluxPipeline is a kind of base model that is not supported"),
    (INDEX, "_class_name", [None], "is a kind of base model that is not supported"),
]


@pytest.mark.parametrize(("file", "key", "value", "message"), VALUES)
def test_values_that_nobody_can_build(file, key, value, message, base):
    table = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(table | {key: value}))
    refused(base, message)


@pytest.mark.parametrize("text", ["", "x", "[1, 2]", '"x"', "null", "[" * 5_000, '{"a": 1, "a": 2}', '"\\ud800"'])
@pytest.mark.parametrize(
    "file", [INDEX, SCHEDULER, UNET, TEXT, "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"]
)
def test_files_that_are_no_table(file, text, base):
    (base / file).write_text(text)
    refused(base, f"{file}: ")


def test_a_table_that_says_nothing(base):
    for file in (INDEX, UNET, TEXT):
        (base / file).write_text("{}")
        refused(base, ": ")
        shutil.copy(GOLDEN_BASE / file, base / file)


def test_a_tensor_that_is_missing(base):
    tensors = load_file(base / UNET_WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, base / UNET_WEIGHTS)
    refused(base, "unet: its file has no tensor 'conv_in.weight'")


def test_words_beyond_the_table(base):
    vocabulary = json.loads((base / "tokenizer" / "vocab.json").read_text())
    (base / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary | {"zzz</w>": 10_000}))
    refused(base, "its tokenizer knows a token 10000, text_encoder only 654")


def to_pickle(base: Path, part: str, trace: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return trace.touch, ()

    (weights,) = (base / part).glob("*.safetensors")
    torch.save({**load_file(weights), "bomb": Bomb()}, base / part / "diffusion_pytorch_model.bin")
    weights.unlink()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_are_pickles_are_not_opened(part, base, tmp_path):
    to_pickle(base, part, tmp_path / "ran")
    refused(
        base, f"{part}: diffusion_pytorch_model.bin is a pickle, which is not opened; save the model as safetensors"
    )
    assert not (tmp_path / "ran").exists()


RENAMED: dict[str, Callable[[Path], Path]] = {
    "fp16": lambda path: path.with_stem(f"{path.stem}.fp16"),
    "fp16 in shards": lambda path: path.with_stem(f"{path.stem}.fp16-00001-of-00001"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_folder_of_one_variant_says_which(name, base):
    for path in base.rglob("*.safetensors"):
        path.rename(RENAMED[name](path))
    refused(base, "text_encoder: there are only weights of the variant fp16; give `variant` fp16")
    refused(base, "there are only weights of the variant fp16; give `variant` fp16", variant="fp8")


def test_a_folder_of_one_variant_is_read_when_that_is_asked_for(base):
    for path in base.rglob("*.safetensors"):
        path.rename(RENAMED["fp16"](path))
    assert load_base(base, variant="fp16").unet.config.sample_size == 16


def test_a_variant_that_is_not_there_is_said(base):
    refused(base, "no weights of the variant fp16 in it; leave out `variant`", variant="fp16")
    refused("emojiland", "emojiland: no weights of the variant fp16 in it", variant="fp16")


def test_a_folder_without_weights(base):
    (base / UNET_WEIGHTS).unlink()
    refused(base, "unet: no weights .*.safetensors. in it")


def test_the_rehearsal_leaves_random_numbers_alone(base):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_base(base)  # its scheduler adds noise
    assert torch.equal(torch.get_rng_state(), before)
