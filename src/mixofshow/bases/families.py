"""Families of base models: what differs between them, as a table, and the questions that the table answers.

What a family's members differ in among themselves (sizes, what the UNet predicts) is in their own configurations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.bases.memory import in_place
from mixofshow.bases.parts import plain
from mixofshow.errors import BaseModelError, shown


@dataclass(frozen=True)
class Family:
    """A kind of model. `text_encoders` pairs each text encoder of the pipeline with its tokenizer.

    The UNet reads what the text encoders say, side by side, without each one's last `skipped_text_layers`. Where a
    text encoder has a projection, the UNet is also told the whole prompt in one vector (pooled), and the picture's size.
    In half precision some autoencoders overflow (`careful_autoencoder`), those whose configuration says `force_upcast`.
    Inpainting bases of the family are written as `inpainting_class`.
    """

    name: str
    pipeline_class: str
    inpainting_class: str
    text_encoders: tuple[tuple[str, str], ...]
    skipped_text_layers: int = 0
    careful_autoencoder: bool = False


FAMILIES: Final = (
    # SD 2.x and Emojiland differ from SD 1.x in sizes and prediction type only, which their configs tell.
    Family("stable-diffusion", "StableDiffusionPipeline", "StableDiffusionInpaintPipeline", (("text_encoder", "tokenizer"),)),
    Family(
        "stable-diffusion-xl",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLInpaintPipeline",
        (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")),
        skipped_text_layers=1,
        careful_autoencoder=True,
    ),
)


def family_of(pipeline: Any) -> Family:
    """The pipeline's family; BaseModelError names the ones that are known. `base_class` speaks for pipelines of ours."""
    if not hasattr(pipeline, "unet"):
        raise BaseModelError(f"expected a base model, as load_base gives it, found {shown(pipeline)}")
    return family_named(getattr(pipeline, "base_class", type(pipeline).__name__))


def family_named(pipeline_class: object, where: str = "") -> Family:
    """The family of a class of pipelines. Raises BaseModelError, `where` in front, that names the ones that are known."""
    for family in FAMILIES:
        if pipeline_class in (family.pipeline_class, family.inpainting_class):
            return family
    known, found = ", ".join(family.pipeline_class for family in FAMILIES), shown(pipeline_class)
    raise BaseModelError(f"{where}{found} is a kind of base model that is not supported; known are {known}")


def takes_masks(pipeline: Any) -> bool:
    """Whether it is an inpainting base: its UNet is given a mask, and what the mask leaves of the picture, beside latents."""
    return bool(pipeline.unet.config.in_channels == 2 * pipeline.vae.config.latent_channels + 1)


def refuse_inpainting(pipeline: Any, what: str) -> None:
    """Raise BaseModelError for an inpainting base, where `what` gives its UNet nothing but latents."""
    if takes_masks(pipeline):
        raise BaseModelError(
            f"{what}: this is an inpainting base; do it on the base that it was made from, and draw here with the concepts "
            "themselves (regional_lora, allow_base sister)"
        )


def version_of(pipeline: Any) -> str:
    """What people call this kind of base: SD 1.x, SD 2.x or SDXL."""
    encoders = text_encoders(pipeline)
    if len(encoders) > 1:
        return "SDXL"
    # OpenCLIP's activation, which SD 2.x has.
    return "SD 2.x" if encoders[0].model.config.hidden_act == "gelu" else "SD 1.x"


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a pipeline, `part` being its name there, and its tokenizer."""

    part: str
    model: Any
    tokenizer: Any
    always_skipped: int = 0

    @property
    def clip_skip(self) -> int:
        """How many of its last layers the UNet's text leaves out beyond what its family always does."""
        return clip_skip_of(self.model) or 0

    @property
    def skipped(self) -> int:
        """How many of its last layers the UNet's text leaves out in all."""
        return self.always_skipped + self.clip_skip

    def as_read(self, states: Tensor) -> Tensor:
        """States before the skipped layers as the UNet reads them: through the final norm, where its family has that."""
        if self.always_skipped or not self.clip_skip:
            return states
        return getattr(self.model, "text_model", self.model).final_layer_norm(states)

    @property
    def table(self) -> Tensor:
        """The vectors of its own tokens, (tokens, dim)."""
        return self.model.get_input_embeddings().weight

    @property
    def first_id(self) -> int:
        """The first id that is no token's."""
        return len(self.table)

    @property
    def width(self) -> int:
        """Width of its token vectors."""
        return self.model.config.hidden_size

    @property
    def length(self) -> int:
        """How many tokens of a prompt it reads."""
        return self.model.config.max_position_embeddings


def text_encoders(pipeline: Any) -> list[TextEncoder]:
    """The pipeline's text encoders in the order in which the UNet reads them."""
    family = family_of(pipeline)
    return [
        TextEncoder(part, plain(getattr(pipeline, part)), getattr(pipeline, tokenizer), family.skipped_text_layers)
        for part, tokenizer in family.text_encoders
    ]


def clip_skip_of(model: Any) -> int | None:
    """How many of its last layers a text encoder's configuration says to skip; None: it does not say. BaseModelError."""
    found: int | None = getattr(model.config, "clip_skip", None)
    if found is not None and (not isinstance(found, int) or not 0 <= found < model.config.num_hidden_layers):
        raise BaseModelError(
            f"`clip_skip`: expected 0 to {model.config.num_hidden_layers - 1}, as many layers as can be skipped, found "
            f"{found!r:.40}; what A1111 calls clip skip 2 is 1 here"
        )
    return found


def clip_skip_said(pipeline: Any) -> int | str:
    """How many last layers the pipeline's text encoders skip: a number where all skip as many, else as "0,1". BaseModelError."""
    each = [one.clip_skip for one in text_encoders(pipeline)]
    return each[0] if len(set(each)) == 1 else ",".join(map(str, each))


def clip_skips(given: int | str | Sequence[int] | None) -> int | Sequence[int] | None:
    """The numbers of "1" or "0,1"; what is numbers stays as it is. Raises BaseModelError."""
    if not isinstance(given, str):
        return given
    try:
        numbers = [int(part) for part in given.split(",")]
    except ValueError as error:
        raise BaseModelError(
            f"`clip_skip`: expected a number, or one for each text encoder, as 0,1, found '{shown(given, 20)}'"
        ) from error
    return numbers if len(numbers) > 1 else numbers[0]


def skip_text_layers(pipeline: Any, clip_skip: int | str | Sequence[int] | None) -> None:
    """Let the text be read before so many of the last layers of all text encoders, or of each; None: as it is now.

    One number, or one for each, also as "0,1". Counted as diffusers does: what others call a clip skip of 2 is 1. It is
    written into the encoders' configurations, so that a model saved from the pipeline is read the same. Raises
    BaseModelError.
    """
    encoders, given = text_encoders(pipeline), clip_skips(clip_skip)
    if given is None:
        return
    each = [given] * len(encoders) if isinstance(given, int) else list(given)
    if len(each) != len(encoders):
        raise BaseModelError(f"`clip_skip`: expected one number, or {len(encoders)}, found {len(each)}")
    for encoder, skip in zip(encoders, each, strict=True):
        encoder.model.config.clip_skip = skip
        clip_skip_of(encoder.model)


@contextlib.contextmanager
def clip_skipped(pipeline: Any, clip_skip: int | None) -> Iterator[None]:
    """Inside, so many of each text encoder's last layers are left out; None: as many as ever. Raises BaseModelError."""
    configs = [one.model.config for one in text_encoders(pipeline)]
    before = [getattr(config, "clip_skip", None) for config in configs]
    try:
        skip_text_layers(pipeline, clip_skip)
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            if clip_skip is not None:
                config.clip_skip = own


def token_width(pipeline: Any) -> int:
    """Width of a word's vector: that of the token vectors of all text encoders, one after the other."""
    return sum(one.width for one in text_encoders(pipeline))


def of_encoders(pipeline: Any, vectors: Tensor) -> list[Tensor]:
    """Words' vectors, (..., dim), as the part that each text encoder reads."""
    return list(vectors.split([one.width for one in text_encoders(pipeline)], dim=-1))


@contextlib.contextmanager
def autoencoder(pipeline: Any) -> Iterator[Any]:
    """The pipeline's autoencoder, inside in single precision where half would overflow, and in place."""
    vae = pipeline.vae
    careful = family_of(pipeline).careful_autoencoder and vae.config.force_upcast and vae.dtype == torch.float16
    try:
        with in_place(vae):
            yield vae.float() if careful else vae
    finally:
        if careful:
            vae.half()


def conditions(pipeline: Any, pooled: Tensor | None, latents: Tensor) -> dict[str, Any]:
    """What the UNet is told beside the text, as keyword arguments for a batch of latents; nothing without `pooled`.

    `pooled` is (rows, dim), of which each serves an equal part of the batch. The size that is told is that of the
    latents' picture, uncut (SDXL §2.2, Podell et al. 2023, arXiv:2307.01952).
    """
    if pooled is None:
        return {}
    height, width = (side * pipeline.vae_scale_factor for side in latents.shape[-2:])
    original, cut, target = (height, width), (0, 0), (height, width)
    sizes = torch.tensor([*original, *cut, *target], dtype=latents.dtype, device=latents.device)
    texts = pooled.to(latents).repeat_interleave(len(latents) // len(pooled), dim=0)
    return {"added_cond_kwargs": {"text_embeds": texts, "time_ids": sizes.expand(len(latents), -1)}}
