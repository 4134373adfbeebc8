"""Loading base models: folders with shards and variants, and whole models in one file of the original layout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixofshow.bases.loading import base_name, load_base
from mixofshow.bases.weight_files import is_checkpoint
from mixofshow.concepts.model import load_model
from mixofshow.errors import BaseModelError

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"

# What the original code calls the parts of its UNet of four levels, as regular expressions for diffusers' names.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
ONCE = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
ONCE |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_unet_name(name: str) -> str:
    for ours, theirs in ONCE.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    for ours, theirs in RESNET.items():
        if "resnets" in name:
            name = name.replace(f".{ours}.", f".{theirs}.")
    rules = [
        (r"down_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"input_blocks.{3 * i + j + 1}.0"),
        (r"down_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"input_blocks.{3 * i + j + 1}.1"),
        (r"down_blocks\.(\d)\.downsamplers\.(0)\.conv", lambda i, _: f"input_blocks.{3 * i + 3}.0.op"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.0"),
        (r"up_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.1"),
        (r"up_blocks\.(\d)\.upsamplers\.(0)", lambda i, _: f"output_blocks.{3 * i + 2}.{2 if i else 1}"),
        (r"mid_block\.(resnets)\.(\d)", lambda _, j: f"middle_block.{2 * j}"),
        (r"mid_block\.(attentions)\.(0)", lambda *_: "middle_block.1"),
    ]
    for pattern, place in rules:
        if found := re.match(pattern, name):
            numbers = [int(one) if one.isdigit() else 0 for one in found.groups()]
            return place(*numbers) + name[found.end() :]
    raise KeyError(name)


def original_vae_name(name: str) -> str:
    for ours, theirs in ATTENTION.items():
        if "attentions" in name:
            name = name.replace(f".{ours}.", f".{theirs}.")
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{3 - int(found[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda found: f"up.{3 - int(found[1])}.upsample.", name)


def original_tensors(pipeline) -> dict[str, torch.Tensor]:
    """All weights under the names of the original code; its autoencoder's attention is of convolutions."""
    tensors = {}
    for name, tensor in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{original_unet_name(name)}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        convolution = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        tensors[f"first_stage_model.{original_vae_name(name)}"] = tensor[..., None, None] if convolution else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def whole(golden_pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "tiny-v1.safetensors"
    save_file(original_tensors(golden_pipeline), path)
    return path


@pytest.mark.parametrize("how", ["config", "beside"])
def test_one_file_is_the_folder_that_it_was_made_from(whole, how, golden_pipeline, tmp_path, offline):
    file = tmp_path / "shared.safetensors"
    shutil.copy(whole, file)
    if how == "beside":
        shutil.copytree(GOLDEN_BASE, tmp_path / "shared", ignore=lambda *_: ["model.safetensors"])
    options = {"config": GOLDEN_BASE} if how == "config" else {}
    assert is_checkpoint(file)
    found = load_model(file, **options).pipeline
    for part in ("unet", "vae", "text_encoder"):
        own, expected = getattr(found, part).state_dict(), getattr(golden_pipeline, part).state_dict()
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[name], expected[name]) for name in own)
    assert (base_name(found), found.safety_checker) == ("shared", None)
    assert {one.dtype for one in load_base(file, dtype=torch.float16, **options).unet.parameters()} == {torch.float16}


def cut(path: Path, table: dict[str, torch.Tensor]) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without_text(path: Path, table: dict[str, torch.Tensor]) -> None:
    save_file({name: one for name, one in table.items() if "cond_stage" not in name}, path)


def without_one(path: Path, table: dict[str, torch.Tensor]) -> None:
    save_file({name: one for name, one in table.items() if name != "first_stage_model.decoder.conv_in.weight"}, path)


def pickled(path: Path, table: dict[str, torch.Tensor]) -> None:
    torch.save(table, path)


@pytest.mark.parametrize(
    ("spoil", "config", "message"),
    [
        (cut, GOLDEN_BASE, r"the file is cut: expected \d+ bytes, found \d+"),
        (without_text, GOLDEN_BASE, "weights are missing"),
        (without_one, GOLDEN_BASE, "weights are missing"),
        (pickled, GOLDEN_BASE, "a PyTorch pickle"),
        (lambda *_: None, None, "configuration and tokenizer of .*stable-diffusion-v1-5 are not here"),
        (lambda *_: None, "nobody/nothing", "configuration and tokenizer of nobody/nothing are not here"),
        (lambda *_: None, Path(__file__).parent, "its config .*model_index.json: cannot be read"),
    ],
)
def test_one_file_that_cannot_be_used(whole, spoil, config, message, tmp_path, offline):
    file = tmp_path / "shared.safetensors"
    shutil.copy(whole, file)
    spoil(file, load_file(whole))
    with pytest.raises(BaseModelError, match=message) as error:
        load_base(file, config=config)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


@pytest.fixture
def sharded(golden_pipeline, tmp_path):
    golden_pipeline.save_pretrained(tmp_path / "shards", max_shard_size="150KB")
    return tmp_path / "shards"


def test_shards_are_loaded(sharded, golden_pipeline):
    assert len(list(sharded.glob("unet/*-of-*.safetensors"))) > 1
    found, expected = load_base(sharded).unet.state_dict(), golden_pipeline.unet.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("fault", ["cut", "missing"])
def test_the_shard_at_fault_is_named(sharded, fault):
    shard = sorted(sharded.glob("unet/*-of-*.safetensors"))[1]
    size = shard.stat().st_size
    cut(shard, {}) if fault == "cut" else shard.unlink()
    wanted = {"cut": f"cut: expected {size} bytes, found {size - 100}", "missing": "is missing, which"}[fault]
    with pytest.raises(BaseModelError, match=f"unet/{shard.name}.*{wanted}"):
        load_base(sharded)


def test_a_list_of_shards_that_is_none(sharded):
    next(sharded.glob("unet/*.index.json")).write_text(json.dumps({"weight_map": 1}))
    with pytest.raises(BaseModelError, match="is no list of shards"):
        load_base(sharded)


def test_variants_are_loaded_and_checked_by_themselves(golden_pipeline, tmp_path):
    golden_pipeline.save_pretrained(tmp_path / "both")
    golden_pipeline.save_pretrained(tmp_path / "both", variant="fp16")
    cut(tmp_path / "both" / "unet" / "diffusion_pytorch_model.safetensors", {})
    load_base(tmp_path / "both", variant="fp16")
    with pytest.raises(BaseModelError, match="unet/diffusion_pytorch_model.safetensors: the file is cut"):
        load_base(tmp_path / "both")
