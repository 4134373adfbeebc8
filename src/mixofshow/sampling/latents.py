"""Between pictures and latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mixofshow.bases.families import autoencoder
from mixofshow.bases.memory import sliced
from mixofshow.errors import MixOfShowError
from mixofshow.sampling.controls import at_level


def initial_latents(pipeline: Any, generators: Sequence[torch.Generator], *, width: int, height: int) -> Tensor:
    """Noise, one picture per generator: (pictures, channels, height, width) of the latents."""
    factor = pipeline.vae_scale_factor
    shape = (pipeline.vae.config.latent_channels, height // factor, width // factor)
    noise = torch.stack([torch.randn(*shape, generator=one, device=one.device) for one in generators])
    return noise.to(pipeline._execution_device, pipeline.unet.dtype)


def require_finite(tensor: Tensor, where: str) -> Tensor:
    """The tensor itself. Raises MixOfShowError, rather than that a picture is black, where a number is not finite."""
    if not torch.isfinite(tensor).all():
        raise MixOfShowError(f"sampling: numbers that are not finite appeared at {where}")
    return tensor


def at_size(images: Sequence[Image.Image], size: tuple[int, int]) -> list[Image.Image]:
    """Pictures, RGB, enlarged or reduced to (width, height)."""
    return [one.convert("RGB").resize(size, Image.Resampling.LANCZOS) for one in images]


def picture_latents(
    pipeline: Any, images: Sequence[Image.Image], generators: Sequence[torch.Generator], *, width: int, height: int
) -> Tensor:
    """Latents of pictures, enlarged or reduced to a size; with one picture, the same for every generator.

    What the autoencoder leaves to chance in picture k comes from generator k.
    """
    return _encoded(pipeline, pipeline.image_processor.preprocess(at_size(images, (width, height))), generators)


def _encoded(pipeline: Any, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Latents of pixels from -1 to 1, (pictures or 1, 3, height, width), one for each generator."""
    with autoencoder(pipeline) as vae:
        pixels = pixels.to(pipeline._execution_device, vae.dtype)
        pixels = pixels.expand(len(generators), -1, -1, -1) if len(pixels) == 1 else pixels
        drawn = [
            vae.encode(one[None]).latent_dist.sample(generator)
            for one, generator in zip(pixels, generators, strict=True)
        ]
    latents = (torch.cat(drawn) * vae.config.scaling_factor).to(pipeline.unet.dtype)
    return require_finite(latents, "the latents of the picture to start from")


def masked_channels(
    pipeline: Any,
    images: Sequence[Image.Image],
    mask: Image.Image | None,
    generators: Sequence[torch.Generator],
    like: Tensor,
) -> Tensor:
    """What an inpainting base is given beside latents, (pictures, 1 + channels, rows, columns) for latents like these.

    It is the mask, 1 where it is white, and the latents of what it leaves of the pictures; the rest is grey. Without a
    mask all of the picture is drawn anew.
    """
    height, width = (side * pipeline.vae_scale_factor for side in like.shape[-2:])
    if mask is None:
        free, left = torch.ones(1, 1, height, width), torch.zeros(1, 3, height, width)
    else:
        free = (torch.from_numpy(np.array(mask)) >= 128).float()[None, None]
        left = pipeline.image_processor.preprocess(at_size(images, (width, height))) * (1 - free)
    cells = functional.interpolate(free, size=like.shape[-2:]).to(like)
    return torch.cat([cells.expand(len(like), -1, -1, -1), _encoded(pipeline, left, generators)], dim=1)


def cells_of(mask: Image.Image, like: Tensor) -> Tensor:
    """How much of each cell of latents, (…, rows, columns), a mask (L) covers, 0 to 1: (rows, columns)."""
    return at_level(torch.from_numpy(np.array(mask)).to(like) / 255, *like.shape[-2:])


def decode(pipeline: Any, latents: Tensor, output_type: str = "pil") -> Any:
    """Clean latents to RGB pictures: a list of them, or one array ("np") or tensor ("pt") of all."""
    height, width = (side * pipeline.vae_scale_factor for side in latents.shape[-2:])
    with autoencoder(pipeline) as vae, sliced(vae, len(latents), width=width, height=height):
        pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    require_finite(pictures, "decoding; in half precision, load the base in fp32 or bf16")
    return pipeline.image_processor.postprocess(pictures, output_type=output_type)
