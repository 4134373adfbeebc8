"""Why a file of another tool does not fit a base: the cause, where the layers that are missing are only its symptoms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from mixofshow.bases.families import version_of
from mixofshow.bases.originals import PREDICTION, PREDICTIONS
from mixofshow.concepts.interchange.kinds import Parts
from mixofshow.errors import shown

_SAID: Final = (
    (re.compile(r"(?<![a-z])(sd|stable.?diffusion).?xl", re.IGNORECASE), "SDXL"),
    (re.compile(r"(?<![a-z])(sd|stable.?diffusion)[\W_]*v?1(?!\d\d)", re.IGNORECASE), "SD 1.x"),
    (re.compile(r"(?<![a-z])(sd|stable.?diffusion)[\W_]*v?2(?!\d\d)", re.IGNORECASE), "SD 2.x"),
)
"""kohya's `sd_v1`, ai-toolkit's `sd_1.5`, modelspec's `stable-diffusion-v1`, and how people write them."""
_NAMED: Final = (
    (re.compile(r"^text_encoder_2_"), "SDXL"),
    (re.compile(r"(double|single)_blocks|single_transformer_blocks"), "Flux or alike"),
    (re.compile(r"joint_blocks|^transformer_"), "a transformer, such as SD 3"),
)
_KEYS: Final = re.compile(r"attn2_to_[kv]$")
_WIDTHS: Final = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
"""Of the text that cross-attention reads."""


def _said(texts: Mapping[str, str]) -> str:
    """What a file says of the kind of base it was made for; python's "None" is nothing."""
    notes = (texts.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture"))
    return " ".join(note for note in notes if note not in ("", "None"))


def said_kind(said: str) -> str | None:
    """The kind of base that is called so; None if it is called like none of ours."""
    return next((kind for pattern, kind in _SAID if pattern.search(said)), None)


def other_base(texts: Mapping[str, str], layers: Mapping[str, Parts], pipeline: Any) -> str | None:
    """That the adapter was made for another kind of base, if it was: by what it says, its names and its widths."""
    said = _said(texts)
    # Another name, such as a finetuned model's, tells something only where its layers do not.
    named = next((kind for pattern, kind in _NAMED if any(map(pattern.search, layers))), None)
    kinds = (said_kind(said), named, _wide_kind(layers), shown(said, 40))
    own = version_of(pipeline)
    found = next(filter(None, kinds), own)
    return (
        f"made for {found}, this base is of {own}; give one of its kind as the base"
        if found != own
        else None
    )


def other_prediction(texts: Mapping[str, str], pipeline: Any) -> str | None:
    """What it says that its base predicted, noise or v, if this base predicts another; None if it does not say."""
    said = PREDICTIONS.get(texts.get(PREDICTION, ""))
    own = pipeline.scheduler.config.get("prediction_type", said)
    return f"made for a base that predicts {said}, this one predicts {own}" if said not in (None, own) else None


def _wide_kind(layers: Mapping[str, Parts]) -> str | None:
    lower = (parts["down"] for name, parts in layers.items() if _KEYS.search(name) and "down" in parts)
    widths = {down.shape[1] for down in lower if down.ndim > 1}
    return _WIDTHS.get(widths.pop()) if len(widths) == 1 else None
