"""Pictures and captions as tensors, batch by batch.

Everything random in batch k is drawn from a generator seeded with (seed, k), and so is the order of the pictures: a
resumed run needs to know nothing but k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from mixofshow.bases.families import autoencoder
from mixofshow.errors import BaseModelError, shown
from mixofshow.tuning.dataset import Example
from mixofshow.tuning.settings import PictureSettings
from mixofshow.tuning.transforms import Fitted, fit, variants

ENCODED_AT_ONCE: Final = 8
PIXELS_AT_ONCE: Final = 512**2
"""More at once would need more memory than training does."""


@dataclass(frozen=True)
class Encoded:
    """A picture for the UNet: mean and spread of its latents, (channels, height, width), and masks, (1, height, width).

    `mask` is where the concept is, `valid` what is not padding; None: everywhere.
    """

    mean: Tensor
    spread: Tensor
    mask: Tensor | None
    valid: Tensor | None


@dataclass(frozen=True)
class Pictures:
    """A batch: latents (batch, channels, height, width); masks (batch, 1, height, width); `masked` (batch,) has a mask."""

    latents: Tensor
    mask: Tensor
    valid: Tensor
    masked: Tensor


def batch_generator(seed: int, number: int) -> torch.Generator:
    """The randomness of batch `number`."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


class Source:
    """The pictures of a data set, encoded once; `crops` 0 encodes a new cut every time instead."""

    def __init__(self, examples: Sequence[Example], settings: PictureSettings, pipeline: Any, *, seed: int) -> None:
        self.examples, self.settings, self.pipeline = examples, settings, pipeline
        scale = pipeline.vae_scale_factor
        self.size = settings.size or pipeline.unet.config.sample_size * scale
        # Every level of the UNet halves the latents.
        self.multiple = scale * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
        generator = batch_generator(seed, -1)
        cuts = [
            variants(one, settings, size=self.size, multiple=self.multiple, generator=generator) for one in examples
        ]
        flat = iter(self._encode([cut for of_one in cuts for cut in of_one]))
        self.encoded = [[next(flat) for _ in of_one] for of_one in cuts]
        for example, of_one in zip(examples, self.encoded, strict=True):
            if not all((one.mean.isfinite() & one.spread.isfinite()).all() for one in of_one):
                raise BaseModelError(
                    f"{shown(example.name)}: its latents are not finite; load the base's autoencoder in fp32"
                )

    @property
    def groups(self) -> list[list[int]]:
        """The pictures by shape: only those of one shape fit into one batch."""
        by_shape: dict[torch.Size, list[int]] = {}
        for index, kept in enumerate(self.encoded):
            by_shape.setdefault(kept[0].mean.shape, []).append(index)
        return list(by_shape.values())

    def draw(self, indices: Sequence[int], generator: torch.Generator) -> Pictures:
        """Latents of these pictures: one of the cuts of each, sampled anew around its mean."""
        if self.settings.crops == 0 and self.settings.fit == "crop":
            chosen = self._encode([self._new_cut(self.examples[index], generator) for index in indices])
        else:
            chosen = [self._pick(self.encoded[index], generator) for index in indices]
        mean, spread = torch.stack([one.mean for one in chosen]), torch.stack([one.spread for one in chosen])
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        everywhere = torch.ones_like(mean[0, :1])
        return Pictures(
            mean + spread * noise,
            torch.stack([everywhere if one.mask is None else one.mask for one in chosen]),
            torch.stack([everywhere if one.valid is None else one.valid for one in chosen]),
            torch.tensor([one.mask is not None for one in chosen], device=mean.device),
        )

    @staticmethod
    def _pick(kept: Sequence[Encoded], generator: torch.Generator) -> Encoded:
        return kept[int(torch.randint(len(kept), (), generator=generator))] if len(kept) > 1 else kept[0]

    def _new_cut(self, example: Example, generator: torch.Generator) -> Fitted:
        flip = self.settings.flip and bool(torch.rand((), generator=generator) < 0.5)
        return fit(example, self.settings, size=self.size, multiple=self.multiple, generator=generator, flip=flip)

    @torch.no_grad()
    def _encode(self, cuts: Sequence[Fitted]) -> list[Encoded]:
        """Mean and spread are kept, so that sampling the latents stays random."""
        encoded, scale = dict[int, Encoded](), self.pipeline.vae.config.scaling_factor
        for part in _alike(cuts):
            pictures = torch.stack([cuts[index].picture for index in part])
            with autoencoder(self.pipeline) as vae:
                posterior = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
            means, spreads = (scale * one.float() for one in (posterior.mean, posterior.std))
            for index, mean, spread in zip(part, means, spreads, strict=True):
                masks = (_small(mask, mean) for mask in (cuts[index].mask, cuts[index].valid))
                encoded[index] = Encoded(mean, spread, *masks)
        return [encoded[index] for index in range(len(cuts))]


def _alike(cuts: Sequence[Fitted]) -> Iterator[list[int]]:
    """Small groups of pictures of one shape."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, cut in enumerate(cuts):
        by_shape.setdefault(cut.picture.shape, []).append(index)
    for (*_, height, width), indices in by_shape.items():
        many = min(ENCODED_AT_ONCE, max(1, PIXELS_AT_ONCE // (height * width)))
        for start in range(0, len(indices), many):
            yield indices[start : start + many]


def _small(mask: Tensor | None, latents: Tensor) -> Tensor | None:
    """A picture's mask at the latents' size."""
    if mask is None:
        return None
    return functional.interpolate(mask[None], size=latents.shape[-2:], mode="nearest")[0].to(latents)


class Order:
    """Which pictures come in which batch: within a group, each once before any comes twice.

    Groups take turns at random, in proportion to their sizes.
    """

    def __init__(self, groups: Sequence[Sequence[int]], size: int, *, batches: int, seed: int) -> None:
        self.groups, self.size, self.seed = groups, size, seed
        shares = torch.tensor([float(len(group)) for group in groups])
        self.turns = torch.multinomial(shares, batches, replacement=True, generator=batch_generator(seed, -2))

    def batch(self, number: int) -> list[int]:
        """The pictures of batch `number`."""
        turn = int(self.turns[number])
        group = self.groups[turn]
        start = int((self.turns[:number] == turn).sum()) * self.size
        return [group[self._place(turn, place)] for place in range(start, start + self.size)]

    def _place(self, turn: int, place: int) -> int:
        round_, rest = divmod(place, len(self.groups[turn]))
        generator = batch_generator(self.seed, -3 - round_ * len(self.groups) - turn)
        return int(torch.randperm(len(self.groups[turn]), generator=generator)[rest])
