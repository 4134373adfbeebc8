"""Families of base models: what differs between them, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from mixofshow.errors import BaseModelError


@dataclass(frozen=True)
class Family:
    """A kind of model. `text_encoders` pairs each text encoder of the pipeline with its tokenizer."""

    name: str
    pipeline_class: str
    text_encoders: tuple[tuple[str, str], ...]


FAMILIES: Final = (
    # SD 2.x and Emojiland differ from SD 1.x in sizes and prediction type only, which their configs tell.
    Family("stable-diffusion", "StableDiffusionPipeline", (("text_encoder", "tokenizer"),)),
)


def family_of(pipeline: Any) -> Family:
    """The pipeline's family; BaseModelError names the ones that are known."""
    name = type(pipeline).__name__
    for family in FAMILIES:
        if family.pipeline_class == name:
            return family
    known = ", ".join(family.pipeline_class for family in FAMILIES)
    raise BaseModelError(f"{name}: this kind of base model is not supported; known are {known}")
