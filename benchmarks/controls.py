"""Do Emojiland's controls put things where a sketch says? Equal prompts and seeds, with each control and without any.

    python benchmarks/controls.py [--json FILE] [--pictures FILE] [--squares 40] [--wides 20]

Layouts that no control was trained on, square ones with one sprite and wide ones with three, before plain
backgrounds, so that what is drawn can be told from the background by its colour. `renders` are the world's own
pictures of these layouts: what the measure itself gets wrong. `class_accuracy` is the judge's, of the squares.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from figures import keep
from PIL import Image
from sketches import centre_error, foreground, overlap, sketched

from emojiland.control_networks import Layout, random_layout
from emojiland.naming import Namer
from mixofshow import MixOfShowPipeline
from mixofshow.bases.emojiland.scenes import PLAIN_SCENES
from mixofshow.bases.emojiland.world import SIZE, WIDE
from mixofshow.bases.loading import EMBEDDED_CONTROLS
from mixofshow.evaluation.scorers import imagenet_scorer
from mixofshow.grids import grid
from mixofshow.sampling.controls import load_control, make_control

FIRST_SEED = 2**40
"""Training draws its layouts from 31-bit seeds."""
SHOWN = 8


def unseen_layouts(count: int, width: int) -> list[Layout]:
    """Layouts before plain backgrounds: one sprite in a square picture, three in a wide one."""
    sprites = 1 if width == SIZE else 3
    return [
        random_layout(Random(FIRST_SEED + width * 1000 + k), width=width, count=sprites, scenes=tuple(PLAIN_SCENES))
        for k in range(count)
    ]


def drawn(draw: MixOfShowPipeline, layouts: list[Layout], network: Any) -> list[Image.Image]:
    """One picture for each layout's caption, picture k from seed k; without a network, uncontrolled."""
    return [
        draw(
            layout.picture.caption,
            width=layout.sketch.width,
            height=SIZE,
            seed=seed,
            controls=[make_control(network, layout.sketch)] if network is not None else [],
        )[0]
        for seed, layout in enumerate(layouts)
    ]


def figures(images: list[Image.Image], layouts: list[Layout]) -> dict[str, float]:
    """Means over all pictures."""
    pairs = [(foreground(image), sketched(layout.sketch)) for image, layout in zip(images, layouts, strict=True)]
    found = {
        "overlap": sum(overlap(*pair) for pair in pairs) / len(pairs),
        "centre_error": sum(centre_error(*pair) for pair in pairs) / len(pairs),
    }
    if layouts[0].sketch.width == SIZE:
        named = Namer.fitted(imagenet_scorer())(images, 1)
        right = [guess == layout.picture.subjects for guess, layout in zip(named, layouts, strict=True)]
        found["class_accuracy"] = sum(right) / len(right)
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Draw, measure, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path)
    options.add_argument("--pictures", type=Path, help="write some of the pictures to this PNG")
    options.add_argument("--squares", type=int, default=40)
    options.add_argument("--wides", type=int, default=20)
    asked = options.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    draw = MixOfShowPipeline.load("emojiland")
    networks = {"without": None, **{name: load_control(name) for name in EMBEDDED_CONTROLS}}
    result: dict[str, Any] = {}
    sheets = []
    for shape, count, width in (("square", asked.squares, SIZE), ("wide", asked.wides, WIDE)):
        layouts = unseen_layouts(count, width)
        images = {"renders": [layout.picture.image for layout in layouts]}
        images |= {name: drawn(draw, layouts, network) for name, network in networks.items()}
        result[shape] = {"pictures": count} | {name: figures(made, layouts) for name, made in images.items()}
        columns = min(count, SHOWN * SIZE // width)
        rows = [[layout.sketch for layout in layouts], *images.values()]
        sheets.append(grid([image for row in rows for image in row[:columns]], columns, row_labels=["sketch", *images]))
    print(json.dumps(result, indent=1))
    keep(result, asked.json)
    if asked.pictures:
        grid(sheets, 1).save(asked.pictures)


if __name__ == "__main__":
    main()
