"""How near drawn pictures are, as a whole, to renders of the same captions that the generator has never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from mixofshow.bases.emojiland.world import KNOWN_SCENES, Picture, compose, random_subjects

SEED: Final = 12 * 10**5

Features = Callable[[Sequence[Image.Image]], Tensor]
"""Pictures to vectors, (pictures, dim)."""


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Between normal distributions fitted to two sets of features, (pictures, dim) each (Heusel et al., 2017, eq. 6)."""
    one, two = first.double(), second.double()
    root = _root(torch.cov(one.T))
    # The trace of (AB)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), whose argument is symmetric.
    mixed = torch.linalg.eigvalsh(root @ torch.cov(two.T) @ root).clamp(min=0).sqrt().sum()
    apart = (one.mean(0) - two.mean(0)).square().sum()
    return float(apart + one.var(0).sum() + two.var(0).sum() - 2 * mixed)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def renders(count: int, *, seed: int = SEED) -> list[Picture]:
    """Pictures of one or two of the classes in known places, which no training has seen."""
    random = Random(seed)
    return [
        compose(random_subjects(random, random.choice((1, 1, 2))), random.choice(list(KNOWN_SCENES)), random)
        for _ in range(count)
    ]


def fidelity(draw: Callable[[list[str]], list[Image.Image]], features: Features, *, count: int = 512) -> float:
    """Distance of drawn pictures from renders over that of renders from other renders; 1 is as good as a render."""
    shown, others = renders(count), renders(count, seed=SEED + 1)
    known = features([picture.image for picture in others])
    drawn = features(draw([picture.caption for picture in shown]))
    return frechet_distance(drawn, known) / frechet_distance(features([picture.image for picture in shown]), known)
