"""Emojiland's autoencoder: pictures of 64×64 to latents of 8×16×16 with one spread, and back."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from mixofshow.bases.emojiland.training import Stage
from mixofshow.bases.emojiland.world import random_picture
from mixofshow.grids import grid

CHANNELS: Final = (16, 32, 64)
LATENT_CHANNELS: Final = 8


class _Reconstruction(nn.Module):
    """Encode, sample, decode; returns pictures and the KL term, so that one call can be distributed."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pictures).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior.kl().mean() / pictures[0].numel()


def build() -> AutoencoderKL:
    """An untrained autoencoder."""
    levels = len(CHANNELS)
    return AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def stage(vae: AutoencoderKL, *, steps: int, batch: int, learning_rate: float) -> Stage:
    """L1 + MSE + gradient loss, and a little KL."""

    def loss(model: nn.Module, seed: int) -> Tensor:
        random = Random(seed)
        pictures = to_tensor(random_picture(random).image for _ in range(batch)).to(vae.device)
        made, kl = model(pictures)
        error = made.float() - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 1e-4 * kl

    def preview(model: nn.Module) -> Image.Image:
        random = Random(-1)
        pictures = to_tensor(random_picture(random).image for _ in range(16))
        made = reconstruct(vae, pictures.to(vae.device)).cpu()
        return grid(to_images(torch.cat([pictures, made])), columns=16)

    return Stage("autoencoder", _Reconstruction(vae), loss, preview, steps, learning_rate)


def to_tensor(images: Iterable[Image.Image]) -> Tensor:
    """RGB pictures of one size as (pictures, 3, height, width) in [-1, 1]."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pictures: Tensor) -> list[Image.Image]:
    """The inverse of `to_tensor`, clamped to what a picture can show."""
    array = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode to the mean latents and decode."""
    return vae.decode(vae.encode(pictures).latent_dist.mode()).sample


@torch.no_grad()
def psnr(vae: AutoencoderKL, count: int = 256, seed: int = 10**6) -> float:
    """Peak signal-to-noise ratio over unseen pictures, in dB; the peak-to-peak range is 2."""
    random = Random(seed)
    pictures = to_tensor(random_picture(random).image for _ in range(count)).to(vae.device)
    made = torch.cat([reconstruct(vae, part) for part in pictures.split(64)]).clamp(-1, 1)
    return float(10 * torch.log10(4 / (made - pictures).square().mean()))


@torch.no_grad()
def balance(vae: AutoencoderKL, count: int = 1024, seed: int = 2 * 10**6) -> None:
    """Give every latent channel mean 0 and spread 1, exactly, inside the 1×1 convolutions beside the latents."""
    random = Random(seed)
    pictures = to_tensor(random_picture(random).image for _ in range(count)).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(64)])
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    before.weight[:channels] /= spread[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / spread
    before.bias[channels:] -= 2 * spread.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= spread[None, :, None, None]
