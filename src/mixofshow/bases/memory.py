"""How much is computed at once, so that it fits: pictures in pieces, and activations that are not kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

CELLS: Final = 4 * 64**2
"""Cells of latents that the UNet is given at once: four pictures of Stable Diffusion 1.5, one of SDXL."""
PIXELS: Final = 512**2
"""What the autoencoder is given at once: one picture of Stable Diffusion 1.5. Its own activations are the largest."""
LARGE: Final = 64
"""Rows of latents from which on a step's activations take more memory than the base."""


def drawn_at_once(pipeline: Any, width: int | None = None, height: int | None = None) -> int:
    """How many pictures of a size in pixels (None: the base's own) the UNet draws side by side, one at least."""
    own: int = pipeline.unet.config.sample_size
    columns, rows = (own if side is None else side // pipeline.vae_scale_factor for side in (width, height))
    return max(1, CELLS // (columns * rows))


def coded_at_once(width: int, height: int) -> int:
    """How many pictures of a size in pixels the autoencoder is given at once, one at least."""
    return max(1, PIXELS // (width * height))


def has_large_pictures(pipeline: Any) -> bool:
    """Whether activations are better computed twice than kept, where nobody said."""
    return bool(pipeline.unet.config.sample_size >= LARGE)


@contextlib.contextmanager
def sliced(vae: Any, count: int, *, width: int, height: int) -> Iterator[None]:
    """Inside, the autoencoder takes `count` pictures of this size one by one, unless all may be taken at once."""
    before = vae.use_slicing
    try:
        vae.use_slicing = before or count > coded_at_once(width, height)
        yield
    finally:
        vae.use_slicing = before


@contextlib.contextmanager
def in_place(vae: Any) -> Iterator[None]:
    """Inside, unless gradients are wanted, an autoencoder's residual blocks make nothing anew that they can write over.

    Bit for bit the same, for a twelfth less of what decoding takes, which is a GPU's peak in drawing large pictures.
    """
    blocks = [] if torch.is_grad_enabled() else [one for one in vae.modules() if _is_plain(one)]
    try:
        for block in blocks:
            block.forward = functools.partial(_residual, block)
        yield
    finally:
        for block in blocks:
            del block.forward


def _is_plain(block: Any) -> bool:
    """Whether it is a residual block of diffusers' that `_residual` says all of; one that accelerate hooks is not."""
    beside = ("upsample", "downsample", "time_emb_proj")
    return (
        type(block).__name__ == "ResnetBlock2D"
        and "forward" not in vars(block)
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.time_embedding_norm != "scale_shift"
        and all(getattr(block, part) is None for part in beside)
    )


def _residual(block: Any, states: Tensor, temb: None = None) -> Tensor:
    """(batch, in, rows, columns) -> (batch, out, rows, columns)."""
    made = block.conv1(functional.silu(block.norm1(states), inplace=True))
    made = functional.silu(block.norm2(made), inplace=True)  # by itself, so that what it is made of goes
    made = block.conv2(block.dropout(made))
    made += states if block.conv_shortcut is None else block.conv_shortcut(states)
    made /= block.output_scale_factor
    return made


@contextlib.contextmanager
def recomputing(unet: Any, text_encoders: Sequence[Any] = (), *, on: bool) -> Iterator[None]:
    """Inside, if `on`, activations are computed again in the backward pass, which must be inside too, and not kept."""
    if not on:
        yield
        return
    before = unet.is_gradient_checkpointing
    try:
        unet.enable_gradient_checkpointing()
        for model in text_encoders:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers recomputes only while training; CLIP has no dropout
        yield
    finally:
        if not before:
            unet.disable_gradient_checkpointing()
        for model in text_encoders:
            model.activation_checkpointing_disable()
            model.eval()
