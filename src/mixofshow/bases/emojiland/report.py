"""What Emojiland can draw, measured by its judge on fresh samples with fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from mixofshow.bases.emojiland import autoencoder, judge
from mixofshow.bases.emojiland.judge import ALL_CLASSES, ALL_SCENES
from mixofshow.bases.emojiland.vocabulary import CLASSES
from mixofshow.bases.emojiland.world import KNOWN_SCENES, SPRITE_HEIGHT, article
from mixofshow.grids import grid
from mixofshow.progress import Progress, silent

REQUIRED: Final = {
    "vae_psnr": 30.0,
    "class_accuracy": 0.90,
    "scene_accuracy": 0.95,
    "pair_accuracy": 0.70,
    "judge_accuracy": 0.98,
}
STEPS: Final = 25
GUIDANCE: Final = 4.0
BATCH: Final = 32
HALF_SHARE: Final = 0.63
"""Side of what is cut out around one of two sprites, as a share of the picture's width."""


def report(
    pipeline: Any,
    *,
    per_class: int,
    judge_folder: Path = judge.JUDGE_FOLDER,
    grids: Path | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """All required figures. `per_class` pictures of every class, spread over all scenes; as many pairs in all."""
    scenes = list(KNOWN_SCENES)
    singles = [(word, scenes[(k + row) % len(scenes)]) for row, word in enumerate(CLASSES) for k in range(per_class)]
    random = Random(0)
    pairs = [(tuple(random.sample(list(CLASSES), 2)), random.choice(scenes)) for _ in range(len(singles) // 2)]
    prompts = [f"a photo of {article(word)} {scene}" for word, scene in singles]
    prompts += [f"a photo of {article(a)} and {article(b)} {scene}" for (a, b), scene in pairs]
    images = sample(pipeline, prompts, progress=progress)
    one, two = images[: len(singles)], images[len(singles) :]
    if grids:
        grids.mkdir(parents=True, exist_ok=True)
        grid(one, columns=per_class).save(grids / "singles.png")
        grid(two[:64], columns=16).save(grids / "pairs.png")
    classes = rank_classes(one, judge_folder)
    places = rank_scenes(one, judge_folder)
    return {
        "vae_psnr": autoencoder.psnr(pipeline.vae),
        "class_accuracy": _share(guess[0] == word for guess, (word, _) in zip(classes, singles, strict=True)),
        "scene_accuracy": _share(guess[0] == scene for guess, (_, scene) in zip(places, singles, strict=True)),
        "pair_accuracy": _share(
            guess == set(words) for guess, (words, _) in zip(best_pairs(two, judge_folder), pairs, strict=True)
        ),
        "judge_accuracy": judge_accuracy(judge_folder),
    }


def _share(hits: Any) -> float:
    values = list(hits)
    return sum(values) / len(values)


@torch.no_grad()
def sample(pipeline: Any, prompts: Sequence[str], *, seed: int = 1, progress: Progress = silent) -> list[Image.Image]:
    """One picture per prompt with plain diffusers; picture k is made from seed + k."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(part))]
        images += pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators).images
        progress(len(images), len(prompts), {})
    return images


def rank_classes(images: Sequence[Image.Image], folder: Path = judge.JUDGE_FOLDER) -> list[list[str]]:
    """For each picture all of the judge's classes, best first."""
    return _rank(images, {word: f"a photo of {article(word)}" for word in ALL_CLASSES}, folder)


def rank_scenes(images: Sequence[Image.Image], folder: Path = judge.JUDGE_FOLDER) -> list[list[str]]:
    """For each picture all scenes, best first; a scene's score is its best over all classes, being shown with one."""
    captions = [f"a photo of {article(word)} {scene}" for scene in ALL_SCENES for word in ALL_CLASSES]
    scores = judge.image_features(images, folder) @ judge.text_features(captions, folder).T
    best = scores.unflatten(1, (len(ALL_SCENES), len(ALL_CLASSES))).amax(-1)
    names = list(ALL_SCENES)
    return [[names[k] for k in row] for row in best.argsort(descending=True).tolist()]


def best_pairs(images: Sequence[Image.Image], folder: Path = judge.JUDGE_FOLDER) -> list[set[str]]:
    """For each picture of two sprites the class that the judge names first in its left half and in its right."""
    halves = [_half(image, side) for image in images for side in (0, 1)]
    named = [ranking[0] for ranking in rank_classes(halves, folder)]
    return [set(pair) for pair in zip(named[::2], named[1::2], strict=True)]


def _half(image: Image.Image, side: int) -> Image.Image:
    """The left (0) or right (1) half, enlarged so that its sprite is as large as in a picture of one."""
    width, height = image.size
    reach, x, y = round(HALF_SHARE * width / 2), (2 * side + 1) * width // 4, round(SPRITE_HEIGHT * height)
    # Mirroring beyond the edge keeps the place what it is.
    padded = np.pad(np.asarray(image), ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    cut = Image.fromarray(padded[y : y + 2 * reach, x : x + 2 * reach])
    return cut.resize(image.size, Image.Resampling.BICUBIC)


def _rank(images: Sequence[Image.Image], captions: dict[str, str], folder: Path) -> list[list[str]]:
    scores = judge.image_features(images, folder) @ judge.text_features(list(captions.values()), folder).T
    names = list(captions)
    return [[names[k] for k in row] for row in scores.argsort(descending=True).tolist()]


def judge_accuracy(folder: Path = judge.JUDGE_FOLDER, count: int = 1000, seed: int = 3 * 10**6) -> float:
    """How often the judge names the class of an unseen render with a single sprite, among all its classes."""
    random = Random(seed)
    pictures = [
        picture for picture in (judge.judged_picture(random) for _ in range(2 * count)) if len(picture.subjects) == 1
    ][:count]
    guesses = rank_classes([picture.image for picture in pictures], folder)
    return _share(guess[0] == picture.subjects[0] for guess, picture in zip(guesses, pictures, strict=True))
