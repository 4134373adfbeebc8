"""Which classes a picture shows, left to right: a linear read-out of a network that learned from photographs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn.functional import one_hot

from emojiland.autoencoder import reconstruct, to_images
from mixofshow.bases.emojiland.judge import to_tensor
from mixofshow.bases.emojiland.vocabulary import CLASSES
from mixofshow.bases.emojiland.world import (
    KNOWN_SCENES,
    SIZE,
    SOFTNESS,
    SPRITE_HEIGHT,
    WIDE,
    Picture,
    compose,
    random_subjects,
)
from mixofshow.evaluation.scorers import ImageTower

PART_SHARE: Final = 0.63
"""Side of what is cut out around one of two sprites in a square picture, as a share of the picture's side."""
LESSONS: Final = {1: 240, 2: 180, 3: 140}
"""How many renders of one, two and three things the read-out is fitted to."""
SEED: Final = 5 * 10**6
RIDGE: Final = 0.1


@dataclass(frozen=True)
class Namer:
    """A network's features, their mean (dim) and a read-out (dim, classes), fitted by ridge regression."""

    features: ImageTower
    mean: Tensor
    readout: Tensor

    @classmethod
    def fitted(
        cls, features: ImageTower, *, vae: AutoencoderKL | None = None, lessons: dict[int, int] = LESSONS
    ) -> Namer:
        """Fitted to renders, and where `vae` is given to the same as that keeps them: what a model draws is no sharper.

        Of renders that it was not fitted to it says all names right.
        """
        groups = {count: renders(count, number, seed=SEED) for count, number in lessons.items()}
        images = {count: [picture.image for picture in group] for count, group in groups.items()}
        kept = {count: as_kept(vae, group) for count, group in images.items()} if vae else {}
        shown = [part for of in (images, kept) for count, group in of.items() for one in group for part in parts(one, count)]
        inputs = features(shown).double()
        words = [list(CLASSES).index(word) for group in groups.values() for picture in group for word in picture.subjects]
        words *= 2 if vae else 1
        targets = one_hot(torch.tensor(words), len(CLASSES)).double()
        mean = inputs.mean(0)
        centred = inputs - mean
        damped = centred.T @ centred + RIDGE * torch.eye(len(mean), dtype=torch.double)
        return cls(features, mean, torch.linalg.solve(damped, centred.T @ (targets - targets.mean(0))))

    def __call__(self, images: Sequence[Image.Image], count: int) -> list[tuple[str, ...]]:
        """For each picture of `count` things their classes, left to right."""
        inputs = self.features([part for image in images for part in parts(image, count)]).double()
        best = ((inputs - self.mean) @ self.readout).argmax(-1).unflatten(0, (len(images), count))
        return [tuple(list(CLASSES)[k] for k in row) for row in best.tolist()]


def renders(count: int, number: int, *, seed: int) -> list[Picture]:
    """Pictures of `count` things in known places, crisp and blurred; three need a wide one."""
    random = Random(seed + count)
    return [
        compose(
            random_subjects(random, count),
            random.choice(list(KNOWN_SCENES)),
            random,
            width=WIDE if count > 2 else SIZE,
            softness=random.choice((0, SOFTNESS)),
        )
        for _ in range(number)
    ]


@torch.no_grad()
def as_kept(vae: AutoencoderKL, images: Sequence[Image.Image]) -> list[Image.Image]:
    """The images, each sent through the autoencoder."""
    return [one for part in to_tensor(images).to(vae.device).split(32) for one in to_images(reconstruct(vae, part))]


def parts(image: Image.Image, count: int) -> list[Image.Image]:
    """What is around each of `count` things side by side, enlarged to the size of a picture of one."""
    return [image] if count == 1 else [_part(image, place, count) for place in range(count)]


def _part(image: Image.Image, place: int, count: int) -> Image.Image:
    """One of `count` equal shares of the width, enlarged so that its sprite is as large as in a picture of one."""
    width, height = image.size
    x, y = (2 * place + 1) * width // (2 * count), round(SPRITE_HEIGHT * height)
    reach = round(PART_SHARE * min(height, 2 * width / count) / 2)
    # Mirroring beyond the edge keeps the place what it is.
    padded = np.pad(np.asarray(image), ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    cut = Image.fromarray(padded[y : y + 2 * reach, x : x + 2 * reach])
    return cut.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
