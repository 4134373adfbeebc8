"""How other tools name an adapter's tensors, and which layer of a base each name means.

tool                       name of the lower half of a query's change
Mix-of-Show, main          params/unet/ PATH.to_q.lora_down.weight
Mix-of-Show, research      params/unet/ PATH.to_q_lora.down.weight
kohya, A1111, ai-toolkit   lora_unet_ PATH_to_q.lora_down.weight, with a tensor lora_unet_ PATH_to_q.alpha
kohya, for SDXL            the same, PATH as in the original code: input_blocks_4_1_…
OneTrainer                 unet. PATH.to_q.lora_down.weight, PATH as in the original code; clip_l. and clip_g.
ComfyUI                    diffusion_model. PATH.to_q.lora_down.weight, PATH as in the original code;
                           text_encoders.clip_l.transformer. and …clip_g.transformer.
LyCORIS alone              lycoris_ PATH_to_q.lora_down.weight
diffusers                  unet. PATH.to_q.lora_A.weight
diffusers, older           unet. PATH.to_q.lora.down.weight, unet. PATH.processor.to_q_lora.down.weight
peft                       base_model.model. PATH.to_q.lora_A.weight

They differ in where dots are underscores, so that names are compared with underscores only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from mixofshow.bases.layers import TEXT_PREFIX, tunable_layers

_KIND: Final = re.compile(
    r"(?:\.lora_(down|up|mid|A|B)(?:\.[\w-]+)?\.weight"
    r"|(?:[._]lora|\.lora_linear_layer)\.(down|up)\.weight"
    r"|\.(alpha|diff|dora_scale|lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)"
    r"(?:\.(?!weight$)[\w-]+)?(?:\.weight)?"
    r"|\.(?:\w+\.)*(bias|diff_b|w_norm|b_norm))$"
)
_CALLED: Final = {"A": "down", "B": "up"}
NO_WEIGHTS: Final = frozenset({"bias", "diff_b", "w_norm", "b_norm"})
"""What no concept can change: biases and norms."""
_OTHERS: Final = (
    (re.compile(r"\.(oft_|boft_)"), "an OFT"),
    (re.compile(r"\.(a1|a2|b1|b2|bm)\.weight$"), "a GLoRA"),
    (re.compile(r"\.(on_input$|ia3_)"), "an (IA)³"),
    (re.compile(r"\.(vera_|lora_embedding_)"), "an adapter of token tables or shared matrices"),
    (re.compile(r"\.scaled?_oft|\.set_weight$"), "a set of whole weights"),
)
_SPELLINGS: Final = (
    # What wraps a model (torch.compile, processes in parallel, peft) puts its own name in front, or between.
    (re.compile(r"(^|(?<=\.))(_orig_mod\.|module\.|base_model\.model\.)"), ""),
    (re.compile(r"^(params/|lycoris_|model\.(?=unet\.))"), ""),
    (re.compile(r"^(lora_unet[._]|(model\.)?diffusion_model\.)"), "unet."),
    (re.compile(r"^(lora_te1?[._]|(text_encoders\.)?clip_l\.(transformer\.)?)"), "text_encoder."),
    (re.compile(r"^(lora_te2[._]|(text_encoders\.)?clip_g\.(transformer\.)?)"), "text_encoder_2."),
    (re.compile(r"[./]"), "_"),
    (re.compile(r"(?<=_)text_model_|^text_model_|(?<=_)processor_"), ""),
)
_AROUND: Final = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}
_INSIDE: Final = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_BLOCK: Final = re.compile(r"(down|mid|up)_blocks?_(?:(\d+)_)?(resnets|attentions|downsamplers|upsamplers)_(\d+)_(\w+)")


def split_key(key: str) -> tuple[str, str] | None:
    """A tensor's name as its layer's, with underscores, and what it is of it; None if it is of no adapter we read."""
    found = _KIND.search(key)
    if not found:
        return None
    called = next(filter(None, found.groups()))
    return _with_underscores(key[: found.start()]), _CALLED.get(called, called)


def other_kind(keys: Iterable[str]) -> str | None:
    """What kind of adapter that we do not read has such a tensor."""
    return next((kind for key in keys for pattern, kind in _OTHERS if pattern.search(key)), None)


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
    for path, name in list(ours.items()):
        if path.startswith("unet_") and (original := _original(path.removeprefix("unet_"), pipeline.unet)):
            ours.setdefault(f"unet_{original}", name)
    others = {
        _with_underscores(f"{part}.{path}")
        for part in {name.split(".", 1)[0] for name in ours.values()}
        for path, module in getattr(pipeline, part).named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    return LayerNames(ours, frozenset(others))


def _original(path: str, unet: nn.Module) -> str | None:
    """A UNet's layer as the original code of Stable Diffusion has it, where blocks are counted through; both with
    underscores."""
    layers = unet.config.layers_per_block  # type: ignore[union-attr]
    found = _BLOCK.fullmatch(path)
    if not found or not isinstance(layers, int):
        return _AROUND.get(path)
    where, kind, rest = found[1], found[3], found[5]
    block, number, attention = int(found[2] or 0), int(found[4]), int(kind == "attentions")
    rest = _INSIDE.get(rest, rest) if kind == "resnets" else rest
    if where == "mid":
        return f"middle_block_{1 if attention else 2 * number}_{rest}"
    if kind == "downsamplers":
        return f"input_blocks_{(block + 1) * (layers + 1)}_0_op"
    if kind == "upsamplers":
        behind = 1 + hasattr(unet.up_blocks[block], "attentions")  # type: ignore[index]
        return f"output_blocks_{block * (layers + 1) + layers}_{behind}_{rest}"
    counted = block * (layers + 1) + number
    return (
        f"input_blocks_{1 + counted}_{attention}_{rest}"
        if where == "down"
        else f"output_blocks_{counted}_{attention}_{rest}"
    )


def kohya_name(layer: str, *, two_encoders: bool = False) -> str:
    """Our layer name as kohya's scripts write it: `lora_unet_…`, `lora_te_text_model_…` (SDXL: `lora_te1_`, `lora_te2_`)."""
    part, path = layer.split(".", 1)
    number = {"text_encoder": "1", "text_encoder_2": "2"}.get(part, "") if two_encoders else ""
    prefix = "lora_unet" if part == "unet" else f"lora_te{number}"
    if part != "unet" and not path.startswith(TEXT_PREFIX):
        path = TEXT_PREFIX + path
    return f"{prefix}_{path}".replace(".", "_")
