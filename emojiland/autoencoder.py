"""Emojiland's autoencoder: pictures of 64×64 to latents of 8×16×16 with one spread, and back."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Final

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor, nn

from emojiland.backdrops import any_backdrop, any_colour
from emojiland.library import Library
from emojiland.pictures import random_picture, random_scene
from emojiland.training import Stage, down
from mixofshow.bases.emojiland.judge import to_tensor
from mixofshow.bases.emojiland.scenes import plain
from mixofshow.bases.emojiland.sprites import recolour
from mixofshow.bases.emojiland.vocabulary import CONCEPT_SETS
from mixofshow.bases.emojiland.world import (
    KNOWN_SCENES,
    SIZE,
    SOFTNESS,
    Picture,
    Placement,
    compose,
    draw_scene,
    paste,
    places,
)
from mixofshow.grids import grid

CHANNELS: Final = (32, 64, 128)
LATENT_CHANNELS: Final = 8
DECODER_NOISE: Final = 0.4
"""How far off the latents may be that the decoder learns from; their own spread is 1."""
UNSEEN: Final = Library.shipped(CONCEPT_SETS)
"""Icons of sets that only concepts are made of."""


class _Reconstruction(nn.Module):
    """Encode, sample, decode; returns pictures and the KL term, so that one call can be distributed."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pictures).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior.kl().mean() / pictures[0].numel()


class _Decoder(nn.Module):
    """The half of an autoencoder that the generator's latents go through."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        pictures: Tensor = self.decoder(self.post_quant_conv(latents))
        return pictures


def build() -> AutoencoderKL:
    """An untrained autoencoder, linear but for its outermost norms: every branch beside the main path begins at 0.

    Few groups, because the norm before the last layer takes each group's mean and contrast away from the whole picture,
    of which colours are made.
    """
    levels = len(CHANNELS)
    vae = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=SIZE,
        scaling_factor=1.0,
    )
    for name, layer in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return vae


def any_picture(random: Random, library: Library) -> Image.Image:
    """A picture unlike a text-to-image world's: icons of any colour, size and tilt, cut anywhere, on any ground.

    Half of them show one thing where people's pictures do, since it is by these that the network will be judged.
    """
    scene = random.choice(list(KNOWN_SCENES.values())) if random.random() < 0.5 else any_backdrop(random)
    image = draw_scene(scene, random)
    laid = places(random, 1)
    if random.random() < 0.5:
        laid = [
            Placement(random.uniform(0, SIZE), random.uniform(0, SIZE), random.randint(20, SIZE), random.gauss(0, 12))
            for _ in range(random.choice((1, 2, 3, 4)))
        ]
    for place in laid:
        paste(image, altered(library.choose(random).picture, random), place)
    return image.filter(ImageFilter.GaussianBlur(random.choice((0, random.uniform(0, SOFTNESS)))))


def altered(icon: Image.Image, random: Random) -> Image.Image:
    """An icon, often mirrored, in other colours, or with an outline as other sets have."""
    if random.random() < 0.5:
        icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < 0.3:
        icon = recolour(icon, random.random())
    elif random.random() < 0.3:
        *colours, alpha = icon.split()
        icon = Image.merge("RGBA", (*random.sample(colours, 3), alpha))
    if random.random() < 0.25:
        icon = outlined(icon, random.choice((3, 3, 5)), random.choice(((0, 0, 0), any_colour(random))))
    return icon


def outlined(icon: Image.Image, width: int, colour: tuple[int, int, int]) -> Image.Image:
    """The icon with a line of `width` pixels (odd) around its shape and along its own strongest edges."""
    alpha = icon.getchannel("A")
    around = ImageChops.subtract(alpha.filter(ImageFilter.MaxFilter(width)), alpha.filter(ImageFilter.MinFilter(width)))
    grey = icon.convert("L")
    steps = ImageChops.subtract(grey.filter(ImageFilter.MaxFilter(width)), grey.filter(ImageFilter.MinFilter(width)))
    inside = ImageChops.darker(steps.point([min(255, 3 * max(0, level - 60)) for level in range(256)]), alpha)
    lines = Image.new("RGBA", icon.size, (*colour, 0))
    lines.putalpha(ImageChops.lighter(around, inside))
    return Image.alpha_composite(icon, lines)


def stage(vae: AutoencoderKL, library: Library, *, steps: int, batch: int, learning_rate: float) -> Stage:
    """L1 + MSE + gradient loss, and a little KL."""

    def loss(model: nn.Module, seed: int) -> Tensor:
        random = Random(seed)
        pictures = to_tensor(any_picture(random, library) for _ in range(batch)).to(vae.device)
        made, kl = model(pictures)
        return _difference(made, pictures) + 1e-4 * kl

    preview = partial(_preview, vae, library)
    return Stage("autoencoder", _Reconstruction(vae), loss, preview, steps, learning_rate, schedule=down)


def decoder_stage(vae: AutoencoderKL, library: Library, *, steps: int, batch: int, learning_rate: float) -> Stage:
    """The decoder alone, on latents that are a little off, as a generator's are, of its pictures and of any others.

    Latents stay what they are, so that a generator and concepts that know them do too.
    """

    def loss(model: nn.Module, seed: int) -> Tensor:
        random, noise = Random(seed), torch.Generator().manual_seed(seed)
        of_both = (
            any_picture(random, library) if k % 2 else random_picture(random, library).image for k in range(batch)
        )
        pictures = to_tensor(of_both).to(vae.device)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mode().float()
        off = DECODER_NOISE * torch.rand(batch, 1, 1, 1, generator=noise) * torch.randn(latents.shape, generator=noise)
        return _difference(model(latents + off.to(latents)), pictures)

    vae.requires_grad_(False)
    model = _Decoder(vae).requires_grad_(True)
    return Stage("decoder", model, loss, partial(_preview, vae, library), steps, learning_rate, schedule=down)


def _difference(made: Tensor, pictures: Tensor) -> Tensor:
    """Of colours, and of the steps between neighbouring pixels."""
    error = made.float() - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def _preview(vae: AutoencoderKL, library: Library, model: nn.Module) -> Image.Image:
    random = Random(-1)
    pictures = to_tensor(any_picture(random, library) for _ in range(16))
    made = reconstruct(vae, pictures.to(vae.device)).cpu()
    return grid(to_images(torch.cat([pictures, made])), columns=16)


def to_images(pictures: Tensor) -> list[Image.Image]:
    """The inverse of `to_tensor`, clamped to what a picture can show."""
    array = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode to the mean latents and decode."""
    return vae.decode(vae.encode(pictures).latent_dist.mode()).sample


def unseen_picture(random: Random, *, softness: float = 0.0) -> Picture:
    """A picture as people tune on: an icon of a set that no network of the base has seen, in a place or on a backdrop."""
    icon = UNSEEN.choose(random)
    phrase, scene = random_scene(random)
    return compose([(icon.name, icon.picture)], phrase, random, scenes={phrase: scene}, softness=softness)


@torch.no_grad()
def psnr(vae: AutoencoderKL, *, softness: float = 0.0, count: int = 256, seed: int = 10**6) -> float:
    """Peak signal-to-noise ratio over pictures with icons of sets never seen, in dB; the peak-to-peak range is 2."""
    random = Random(seed)
    pictures = to_tensor(unseen_picture(random, softness=softness).image for _ in range(count)).to(vae.device)
    made = torch.cat([reconstruct(vae, part) for part in pictures.split(64)]).clamp(-1, 1)
    return float(10 * torch.log10(4 / (made - pictures).square().mean()))


@torch.no_grad()
def colour_error(vae: AutoencoderKL, *, count: int = 128, seed: int = 11 * 10**5) -> float:
    """How far plain backgrounds of any colour come out beside what they were, on average, in levels of 255."""
    random = Random(seed)
    errors = []
    for _ in range(count):
        icon = UNSEEN.choose(random)
        scene = plain(any_colour(random))
        picture = compose([(icon.name, icon.picture)], "", random, scenes={"": scene}, softness=0).image
        before = to_tensor([picture]).to(vae.device)
        ground = (before == before[:, :, :1, :1]).all(1)  # the corner's colour: sprites do not reach it
        after = reconstruct(vae, before).clamp(-1, 1)
        errors.append((after - before).abs().mean(1)[ground].mean() * 127.5)
    return float(torch.stack(errors).mean())


@torch.no_grad()
def balance(vae: AutoencoderKL, library: Library, *, count: int = 1024, seed: int = 2 * 10**6) -> None:
    """Give every latent channel mean 0 and spread 1, exactly, inside the 1×1 convolutions beside the latents."""
    random = Random(seed)
    pictures = to_tensor(random_picture(random, library).image for _ in range(count)).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(64)])
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    before.weight[:channels] /= spread[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / spread
    before.bias[channels:] -= 2 * spread.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= spread[None, :, None, None]
