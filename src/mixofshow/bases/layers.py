"""The layers of a base model that concepts touch: their order, their names, and how to reach them.

A layer's name in our files is `<part>.<module path>`, as in diffusers' own LoRA files. CLIP text encoders
carry the prefix `text_model.` there, whether or not the installed transformers still has it.
"""

from __future__ import annotations

import re
import sys
from typing import Any, Final, Literal

from torch import Tensor, nn

from mixofshow.bases.families import text_encoders
from mixofshow.bases.parts import plain, refuse_unreachable
from mixofshow.errors import BaseModelError

BLOCK_ORDER: Final = ("down_blocks", "mid_block", "up_blocks")
_BEFORE, _BEHIND = ("conv_in", "time_embedding", "add_embedding"), ("conv_out",)
_ATTENTION: Final = r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$"
_FEED_FORWARD: Final = r"\.ff\.net\.(0\.proj|2)$"
_PROJECTIONS: Final = rf"{_ATTENTION}|{_FEED_FORWARD}|attentions\.\d+\.proj_(in|out)$"
_CONVOLUTIONS: Final = (
    rf"{_PROJECTIONS}|\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)$|samplers\.\d+\.conv$"
)
_SELF_ATTENTION: Final = r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$"
UNET_TARGETS: Final = {
    "keys-and-values": re.compile(r"\.attn2\.to_[kv]$"),
    "attention": re.compile(_ATTENTION),
    "feed-forward": re.compile(f"{_ATTENTION}|{_FEED_FORWARD}"),
    "projections": re.compile(_PROJECTIONS),
    "convolutions": re.compile(_CONVOLUTIONS),
    "all": re.compile(rf"{_CONVOLUTIONS}|^conv_(in|out)$|^(time|add)_embedding\.linear_\d$"),
}
TEXT_TARGETS: Final = {
    "attention": re.compile(_SELF_ATTENTION),
    "layers": re.compile(rf"{_SELF_ATTENTION}|\.mlp\.fc[12]$"),
}
"""Sets of layers that a concept may change, each holding the one before."""
_PLACE: Final = re.compile(r"^(?:down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.")
_TURNS: Final = ("resnets", "attentions")
TEXT_PREFIX: Final = "text_model."
_IN_BLOCK: Final = ".transformer_blocks."


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """The UNet's cross-attention layers by path, in the order in which a picture passes them: down, mid, up.

    Every count and index of layers in this package comes from here. (`unet.attn_processors` lists mid last.) Raises
    BaseModelError when there is none.
    """
    found = {name: module for name, module in plain(unet).named_modules() if name.endswith(".attn2")}
    ordered = {name: found[name] for block in BLOCK_ORDER for name in found if name.startswith(block)}
    if not ordered:
        raise BaseModelError(f"{type(unet).__name__}: has no cross-attention (attn2) that could read a prompt")
    return ordered


def text_groups(unet: nn.Module) -> dict[str, int]:
    """Which variant of a prompt each cross-attention layer reads, by path, in order; variants count from 0.

    The layers of one block of attention (diffusers' Transformer2DModel) share a variant. In SD 1.x and 2.x a block has
    one such layer, so each has a variant of its own; SDXL has 70 of them in 11 blocks.
    """
    blocks: dict[str, int] = {}
    return {path: blocks.setdefault(path.split(_IN_BLOCK)[0], len(blocks)) for path in cross_attentions(unet)}


def count_groups(unet: nn.Module) -> int:
    """How many variants of a prompt the UNet reads: the vectors that a layer-wise word has."""
    return len(set(text_groups(unet).values()))


def lora_layers(pipeline: Any, *, unet: str = "attention", text_encoder: str = "attention") -> dict[str, nn.Module]:
    """The linear layers and convolutions in sets of targets, by our name, in forward order."""
    layers = {}
    for encoder in text_encoders(pipeline):
        for path, module in encoder.model.named_modules():
            if TEXT_TARGETS[text_encoder].search(path):
                layers[f"{encoder.part}.{TEXT_PREFIX}{path.removeprefix(TEXT_PREFIX)}"] = module
    found = {path: module for path, module in plain(pipeline.unet).named_modules() if UNET_TARGETS[unet].search(path)}
    for block in (*_BEFORE, *BLOCK_ORDER, *_BEHIND):
        inside = sorted((path for path in found if path.startswith(block)), key=_place)
        layers |= {f"unet.{path}": found[path] for path in inside}
    return layers


def _place(path: str) -> tuple[int, int, int]:
    """Where a picture passes a layer: in each block resnets and attentions take turns, and the samplers come last."""
    if (found := _PLACE.match(path)) is None:
        return (0, 0, 0)
    block, kind, number = int(found[1] or 0), found[2], int(found[3])
    return (block, number, _TURNS.index(kind)) if kind in _TURNS else (block, sys.maxsize, number)


def tunable_layers(pipeline: Any) -> dict[str, nn.Module]:
    """Every layer that some method or setting can change, by our name, in forward order."""
    return lora_layers(pipeline, unet="all", text_encoder="layers")


def kind_of(name: str) -> Literal["unet", "text_encoder"]:
    """Whether one of our layer names is of the UNet or of any text encoder."""
    return "unet" if name.startswith("unet.") else "text_encoder"


def module_path(pipeline: Any, name: str) -> tuple[str, str]:
    """Split our layer name into (part, path inside that part of this pipeline)."""
    part, path = name.split(".", 1)
    if not hasattr(plain(getattr(pipeline, part, None)), TEXT_PREFIX.removesuffix(".")):
        path = path.removeprefix(TEXT_PREFIX)
    return part, path


def layer(pipeline: Any, name: str) -> nn.Module:
    """The module that our name stands for. Raises BaseModelError when it is not there, or its weight is out of reach."""
    part, path = module_path(pipeline, name)
    try:
        module: nn.Module = plain(getattr(pipeline, part)).get_submodule(path)
    except AttributeError as error:
        raise BaseModelError(f"the base model has no layer '{name}'") from error
    refuse_unreachable(module, name)
    return module


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer or convolution as a matrix, a view of it: (out, in), or (out, in · height · width)."""
    weight = module.weight
    return weight.flatten(1)  # type: ignore[operator]


def where_double(tensor: Tensor) -> Tensor:
    """The tensor where double precision is: on the CPU, if its own device (Apple's GPUs) has none."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def kernel_of(module: nn.Module) -> tuple[int, ...]:
    """Height and width of a convolution's kernel; () of a linear layer, and of a 1×1 convolution, which is as one."""
    kernel: tuple[int, ...] = tuple(module.weight.shape[2:])  # type: ignore[index]
    return () if kernel == (1, 1) else kernel
