"""How other tools name a LoRA's tensors, and which layer of a base each name means.

tool                       name of the lower half of a query's change
Mix-of-Show, main          params/unet/ PATH.to_q.lora_down.weight
Mix-of-Show, research      params/unet/ PATH.to_q_lora.down.weight
kohya, A1111               lora_unet_ PATH_to_q.lora_down.weight, with a tensor lora_unet_ PATH_to_q.alpha
diffusers                  unet. PATH.to_q.lora_A.weight
diffusers, older           unet. PATH.to_q.lora.down.weight, unet. PATH.processor.to_q_lora.down.weight
peft                       base_model.model. PATH.to_q.lora_A.weight

They differ in where dots are underscores, so that names are compared with underscores only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn

from mixofshow.bases.layers import TEXT_PREFIX, tunable_layers

Half = Literal["down", "up", "alpha", "mid"]

_HALF: Final = re.compile(
    r"(?:\.lora_(down|up|mid|A|B)(?:\.\w+)?\.weight|(?:[._]lora|\.lora_linear_layer)\.(down|up)\.weight|\.(alpha))$"
)
_HALVES: Final[dict[str, Half]] = {"A": "down", "B": "up", "down": "down", "up": "up", "mid": "mid", "alpha": "alpha"}
_SPELLINGS: Final = (
    (re.compile(r"^(params/|base_model\.model\.)"), ""),
    (re.compile(r"^lora_unet_"), "unet."),
    (re.compile(r"^lora_te1?_"), "text_encoder."),
    (re.compile(r"^lora_te2_"), "text_encoder_2."),
    (re.compile(r"[./]"), "_"),
    (re.compile(r"(?<=_)text_model_|^text_model_|(?<=_)processor_"), ""),
)


def split_key(key: str) -> tuple[str, Half] | None:
    """A tensor's name as its layer's, with underscores, and which half it is; None if it is no LoRA's."""
    found = _HALF.search(key)
    if not found:
        return None
    return _with_underscores(key[: found.start()]), _HALVES[next(filter(None, found.groups()))]


def _with_underscores(name: str) -> str:
    for pattern, instead in _SPELLINGS:
        name = pattern.sub(instead, name)
    return name


@dataclass(frozen=True)
class LayerNames:
    """A base's layers by their names with underscores: `ours` those that concepts may change, `others` the rest."""

    ours: Mapping[str, str]
    others: frozenset[str]

    def find(self, name: str) -> str | None:
        """Our name of the layer, or None. A name without its part (peft) is looked for in all of them."""
        return next((self.ours[one] for one in _with_parts(name) if one in self.ours), None)

    def knows(self, name: str) -> bool:
        """Whether the base has this layer at all."""
        return any(one in self.ours or one in self.others for one in _with_parts(name))


def _with_parts(name: str) -> tuple[str, ...]:
    return name, f"unet_{name}", f"text_encoder_{name}"


def layer_names(pipeline: Any) -> LayerNames:
    """The names of this base's layers."""
    ours = {_with_underscores(name): name for name in tunable_layers(pipeline)}
    # diffusers' older LoRA know one output layer, where there is a list of it and its dropout.
    ours |= {name.removesuffix("_0"): ours[name] for name in list(ours) if name.endswith("_to_out_0")}
    others = {
        _with_underscores(f"{part}.{path}")
        for part in {name.split(".", 1)[0] for name in ours.values()}
        for path, module in getattr(pipeline, part).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    return LayerNames(ours, frozenset(others))


def kohya_name(layer: str, *, two_encoders: bool = False) -> str:
    """Our layer name as kohya's scripts write it: `lora_unet_…`, `lora_te_text_model_…` (SDXL: `lora_te1_`, `lora_te2_`)."""
    part, path = layer.split(".", 1)
    number = {"text_encoder": "1", "text_encoder_2": "2"}.get(part, "") if two_encoders else ""
    prefix = "lora_unet" if part == "unet" else f"lora_te{number}"
    if part != "unet" and not path.startswith(TEXT_PREFIX):
        path = TEXT_PREFIX + path
    return f"{prefix}_{path}".replace(".", "_")
