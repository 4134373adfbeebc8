"""Compositions to files: pictures, their layout, and grids of seeds and settings."""

from __future__ import annotations

import colorsys
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

from mixofshow.bases.loading import EMBEDDED
from mixofshow.concepts.concept import Concept, follow_clip_skip, vocabulary
from mixofshow.concepts.interchange.importing import name_ahead, open_concept, read_ahead, scaled
from mixofshow.concepts.manifest import MANIFEST, read_manifest
from mixofshow.concepts.model import load_model, load_unfused, with_concept, with_words
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import SettingsError, nearest, require, shown
from mixofshow.grids import grid
from mixofshow.outputs import write_text
from mixofshow.progress import Progress, as_part, silent
from mixofshow.replaceable import COMPOSITION
from mixofshow.sampling.composition import compose, settled, variations
from mixofshow.sampling.finding import Layout
from mixofshow.sampling.inputs import Callback
from mixofshow.sampling.latents import decode
from mixofshow.sampling.pictures import read_picture, write_picture
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.regions import bounding_cells, coverage, shape_of
from mixofshow.sampling.replay import maker_of, resolved, save_picture
from mixofshow.sampling.settings import AUTO, MAX_STRENGTH, Composition, Region

logger = logging.getLogger(__name__)

YAML_HEAD: Final = f"{COMPOSITION}mixofshow sample draws it."
TINT: Final = 0.35
SMALLEST_SIDE: Final = 512
"""Of a layout, in pixels."""


def open_pipeline(
    model: str,
    *,
    base: str | None = None,
    concepts: Sequence[Path] = (),
    strength: float = 1.0,
    regional_lora: bool = False,
    composition: Composition | None = None,
    **loading: Any,
) -> MixOfShowPipeline:
    """A fused folder, delta file or base model by its name, with concepts, or other tools' LoRAs, at a strength.

    A single one is put on the base, unless it is to be drawn in regions only, as several are. With `regional_lora` a
    fused folder comes with its concepts and base. `loading` are options of `load_base`. The concepts, and the words in
    the prompts of the `composition` that is to be drawn, are read before anything large. Raises as `load_model` and
    `open_concept` do.
    """
    require(abs(strength) <= MAX_STRENGTH, "`strength`", strength, f"at most {MAX_STRENGTH:g}")
    if strength != 1 and not concepts:
        logger.warning("`strength` changes nothing without concepts; how far to go from a picture is `image_strength`")
    ahead = [read_ahead(one) for one in concepts]
    if composition:
        require_known_words(composition, known_words(model, ahead))
        _require_known_adapters(composition, model, dict(zip(concepts, ahead, strict=True)))
    load = load_unfused if regional_lora and not concepts and os.path.isdir(model) else load_model
    known = load(model, base=base, **loading)
    if concepts:
        follow_clip_skip(known.pipeline, filter(None, ahead))
        files = [open_concept(one, known.pipeline) for one in concepts]
        if regional_lora or len(files) > 1:
            scaled_files = [scaled(one, unet=strength, text_encoder=strength) for one in files]
            known = with_words(known.pipeline, scaled_files)
        else:
            known = with_concept(known.pipeline, files[0], strength)
    return MixOfShowPipeline.of(known)


def drawn_together(files: Sequence[Path], composition: Composition) -> tuple[Sequence[Path], Composition]:
    """The concept files, and the composition: several draw only in regions. Raises SettingsError without any."""
    if len(files) < 2:
        return files, composition
    if not composition.regions and not composition.redo and not composition.auto:
        raise SettingsError(
            f"concept: {len(files)} files without regions: give each its place by `region`, have places found by "
            f"`regions` {AUTO}, or make one model of them by `mixofshow fuse`"
        )
    return files, composition.model_copy(update={"regional_lora": True})


def require_known_words(composition: Composition, known: Vocabulary | None) -> None:
    """Raise TokenError for a word in a prompt that nobody will know."""
    if known is not None:
        known = replace(known, syntax=composition.prompt_syntax)
        for prompt in composition.texts:
            known.split(prompt)


def _require_known_adapters(composition: Composition, model: str, concepts: Mapping[Path, Concept | None]) -> None:
    """Raise SettingsError for a LoRA of a region that nobody will have."""
    asked = dict.fromkeys(name for region in composition.regions for name in region.adapters or ())
    if not asked or not (concepts or model in EMBEDDED or os.path.isfile(Path(model) / MANIFEST)):
        return
    there = [one.info.name if one else name_ahead(path) for path, one in concepts.items()]
    if not concepts and model not in EMBEDDED:
        there = [one.name for one in read_manifest(Path(model)).concepts]
    if missing := [name for name in asked if name not in there]:
        hint = nearest(missing[0], there) or f"; there are {shown(', '.join(there) or 'none')}"
        raise SettingsError(f"regions: no concept is called {shown(', '.join(missing))}{hint}")


def known_words(model: str, concepts: Sequence[Concept | None]) -> Vocabulary | None:
    """The words that prompts may use, where small files tell: of our concepts, a fused folder, the embedded base."""
    if concepts:
        return None if None in concepts else vocabulary(filter(None, concepts))
    if model in EMBEDDED:
        return Vocabulary()
    if not os.path.isfile(Path(model) / MANIFEST):
        return None
    manifest = read_manifest(Path(model))
    return Vocabulary(dict.fromkeys(manifest.words, torch.empty(0)), manifest.aliases)


def draw_pictures(
    pipeline: MixOfShowPipeline,
    composition: Composition,
    targets: Sequence[Path],
    *,
    layout: Path | None = None,
    regions: Path | None = None,
    progress: Progress = silent,
    step_end: Callback | None = None,
) -> None:
    """Write a composition's pictures; see `compose`.

    If asked for, also the regions over the first of them, or over the draft in which their places were found, as `layout`,
    and a composition that draws the first again, with its `regions` as masks beside it.
    """
    maker, composition = maker_of(pipeline), resolved(composition, pipeline)
    images = compose(pipeline, composition, progress=progress, step_end=step_end)
    found: Sequence[Layout | None] = images.layouts or [None] * len(images)
    for number, (image, target, places) in enumerate(zip(images, targets, found, strict=True)):
        save_picture(image, target, settled(composition, places), maker, number)
    first = settled(composition, found[0])
    if layout is not None:
        under = decode(pipeline, found[0].draft)[0] if found[0] else images[0]
        write_picture(draw_layout(under, (first.redo,) if first.redo else first.regions), layout)
    if regions is not None:
        save_regions(first.model_copy(update={"num": 1}), regions)


def beside(path: Path | None) -> list[Path]:
    """Pictures that are there already where `save_regions` would write those of a YAML file."""
    name = re.compile(re.escape(path.stem if path else "") + r"-(region-[0-9]+|redo|image|mask)\.png")
    return sorted(one for one in path.parent.glob("*.png") if name.fullmatch(one.name)) if path else []


def save_regions(composition: Composition, path: Path) -> None:
    """Write a composition as YAML, its pictures beside it as PNGs that can be edited; `sample` draws it again.

    Of a control, as in a PNG, only the name and the hashes are written down.
    """
    table = composition.model_dump(mode="json", exclude_defaults=True)
    pictures: dict[Path, str] = {}

    def put_beside(name: str, picture: str) -> str:
        target = path.with_name(f"{path.stem}-{name}.png")
        pictures[target] = picture
        return target.name

    named = {f"region-{number}": region for number, region in enumerate(table.get("regions", []), 1)}
    for name, region in (named | ({"redo": table["redo"]} if "redo" in table else {})).items():
        plain = Region.__dataclass_fields__
        for key in [key for key, value in region.items() if key != "prompt" and value == plain[key].default]:
            del region[key]
        if "mask" in region:
            region["mask"] = put_beside(name, region["mask"])
    for key in ("image", "mask"):
        if key in table:
            table[key] = put_beside(key, table[key])
    for target, picture in pictures.items():
        write_picture(read_picture(picture, "RGB" if target.stem.endswith("-image") else "L"), target)
    text = yaml.safe_dump(table, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_text(path, f"{YAML_HEAD}\n{text}")


def grid_rows(composition: Composition, vary: str | None) -> list[tuple[str, Composition]]:
    """What the rows of a grid show, labelled; see `variations`. Raises SettingsError."""
    rows = list(variations(composition, vary))
    if len({one.num for _, one in rows}) > 1 or any(one.seed != composition.seed for _, one in rows):
        raise SettingsError(f"vary: a column is a seed, so that seed and num cannot vary; found '{shown(vary)}'")
    return rows


def draw_grid(
    pipeline: MixOfShowPipeline, composition: Composition, vary: str | None, out: Path, *, progress: Progress = silent
) -> None:
    """Write one sheet: a column for each seed, a row for each value of the setting in `vary`; see `grid_rows`."""
    rows = grid_rows(composition, vary)
    images: list[Image.Image] = []
    for number, (_, one) in enumerate(rows):
        images += compose(pipeline, one, progress=as_part(progress, number, len(rows)))
    seeds = [f"seed {composition.seed + number}" for number in range(composition.num)]
    labels = [label for label, _ in rows] if vary else []
    write_picture(grid(images, composition.num, column_labels=seeds, row_labels=labels), out)


def draw_layout(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """The picture, enlarged if it is small, each region tinted as far as it is covered and outlined, with its prompt."""
    scale = max(1, round(SMALLEST_SIDE / max(image.size)))
    large = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pixels = np.array(large, dtype=np.float32)
    labels = []
    for number, region in enumerate(regions):
        shape = shape_of(region, width=image.width, height=image.height)
        cover = coverage(shape, columns=large.width, rows=large.height)
        colour = 255 * np.array(colorsys.hsv_to_rgb(number / len(regions), 1, 1), dtype=np.float32)
        inside = cover.numpy() >= 0.5
        tint = np.maximum(TINT * cover.numpy(), _outline(inside))[..., None]
        pixels = (1 - tint) * pixels + tint * colour
        labels.append((bounding_cells(cover)[:2], f"{number + 1} {region.prompt}"))
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(12)
    for (left, top), text in labels:
        pen.text((left + 3, top + 2), text, fill="white", font=font, stroke_width=1, stroke_fill="black")
    return drawn


def _outline(inside: np.ndarray) -> np.ndarray:
    """1 on the cells inside that have a neighbour outside."""
    padded = np.pad(inside, 1)
    deep = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return (inside & ~deep).astype(np.float32)
