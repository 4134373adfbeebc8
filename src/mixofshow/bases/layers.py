"""The layers of a base model that concepts touch: their order, their names, and how to reach them.

A layer's name in our files is `<part>.<module path>`, as in diffusers' own LoRA files. CLIP text encoders
carry the prefix `text_model.` there, whether or not the installed transformers still has it.
"""

from __future__ import annotations

import re
from typing import Any, Final

from torch import Tensor, nn

from mixofshow.errors import BaseModelError

BLOCK_ORDER: Final = ("down_blocks", "mid_block", "up_blocks")
UNET_TARGETS: Final = re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$")
TEXT_TARGETS: Final = re.compile(r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$")
TEXT_PREFIX: Final = "text_model."


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """The UNet's cross-attention layers by path, in the order in which a picture passes them: down, mid, up.

    Every count and index of layers in this package comes from here. (`unet.attn_processors` lists mid last.)
    """
    found = {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}
    return {name: found[name] for block in BLOCK_ORDER for name in found if name.startswith(block)}


def lora_layers(pipeline: Any) -> dict[str, nn.Module]:
    """Every linear layer in the attention blocks of text encoder and UNet, by our name, in forward order."""
    layers = {}
    for path, module in pipeline.text_encoder.named_modules():
        if TEXT_TARGETS.search(path):
            layers[f"text_encoder.{TEXT_PREFIX}{path.removeprefix(TEXT_PREFIX)}"] = module
    unet = {path: module for path, module in pipeline.unet.named_modules() if UNET_TARGETS.search(path)}
    for block in BLOCK_ORDER:
        layers |= {f"unet.{path}": module for path, module in unet.items() if path.startswith(block)}
    return layers


def module_path(pipeline: Any, name: str) -> tuple[str, str]:
    """Split our layer name into (part, path inside that part of this pipeline)."""
    part, path = name.split(".", 1)
    if part == "text_encoder" and not hasattr(pipeline.text_encoder, "text_model"):
        path = path.removeprefix(TEXT_PREFIX)
    return part, path


def layer(pipeline: Any, name: str) -> nn.Module:
    """The module that our name stands for."""
    part, path = module_path(pipeline, name)
    try:
        module: nn.Module = getattr(pipeline, part).get_submodule(path)
    except AttributeError as error:
        raise BaseModelError(f"the base model has no layer '{name}'") from error
    return module


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer or 1×1 convolution as a matrix, (out, in); a view of the weight."""
    weight = module.weight
    return weight.flatten(1)  # type: ignore[operator]


def token_width(pipeline: Any) -> int:
    """Width of the text encoder's token embeddings."""
    width: int = pipeline.text_encoder.config.hidden_size
    return width
