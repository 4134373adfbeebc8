"""Why a file of another tool does not fit a base: the cause, where the layers that are missing are only its symptoms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from mixofshow.bases.families import version_of
from mixofshow.concepts.interchange.kinds import Parts
from mixofshow.errors import shown

_SAID: Final = (
    (re.compile(r"sd_v1|stable-diffusion-v1"), "SD 1.x"),
    (re.compile(r"sd_v2|stable-diffusion-v2"), "SD 2.x"),
    (re.compile(r"sdxl|stable-diffusion-xl"), "SDXL"),
)
_NAMED: Final = (
    (re.compile(r"^text_encoder_2_"), "SDXL"),
    (re.compile(r"(double|single)_blocks|single_transformer_blocks"), "Flux or alike"),
    (re.compile(r"joint_blocks|^transformer_"), "a transformer, such as SD 3"),
)
_KEYS: Final = re.compile(r"attn2_to_[kv]$")
_WIDTHS: Final = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
"""Of the text that cross-attention reads."""


def said_kind(texts: Mapping[str, str]) -> str | None:
    """For which kind of base a file says that it was made."""
    said = f"{texts.get('ss_base_model_version', '')} {texts.get('modelspec.architecture', '')}".strip()
    return next((kind for pattern, kind in _SAID if pattern.search(said)), shown(said, 40) or None)


def other_base(texts: Mapping[str, str], layers: Mapping[str, Parts], pipeline: Any) -> str | None:
    """That the adapter was made for another kind of base, if it was: by what it says, its names and its widths."""
    kinds = (said_kind(texts), _named_kind(layers), _wide_kind(layers))
    own, found = version_of(pipeline), next(filter(None, kinds), None)
    return (
        f"made for {found}, this base is of {own}; give one of its kind as the base"
        if found not in (None, own)
        else None
    )


def _named_kind(layers: Mapping[str, Parts]) -> str | None:
    return next((kind for pattern, kind in _NAMED if any(map(pattern.search, layers))), None)


def _wide_kind(layers: Mapping[str, Parts]) -> str | None:
    widths = {parts["down"].shape[1] for name, parts in layers.items() if _KEYS.search(name) and "down" in parts}
    return _WIDTHS.get(widths.pop()) if len(widths) == 1 else None
