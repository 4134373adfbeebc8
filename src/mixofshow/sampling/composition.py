"""A composition: everything that a picture is made from, as YAML and in the PNG itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixofshow.errors import RegionError, SettingsError, field_problem, shown
from mixofshow.files import read_table, refuse_unwritable, writing
from mixofshow.progress import Progress, silent
from mixofshow.sampling.pipeline import STEPS, MixOfShowPipeline
from mixofshow.sampling.regions import Box, Region

PNG_KEY: Final = "mixofshow"


class RegionEntry(BaseModel):
    """A region as written in YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    box: Box
    prompt: str
    negative_prompt: str | None = None


class Composition(BaseModel):
    """Prompts, places, size and seed. Two equal compositions give equal pictures on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    negative_prompt: str = ""
    regions: tuple[RegionEntry, ...] = ()
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    seed: int = 0
    num: int = Field(1, ge=1, le=10_000)
    steps: int = Field(STEPS, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)


def make_composition(table: Mapping[str, Any], source: str = "composition") -> Composition:
    """A checked composition. Raises SettingsError naming the field and the nearest known one."""
    try:
        return Composition.model_validate(table)
    except ValidationError as error:
        problem = field_problem(error.errors()[0], Composition.model_fields)
        raise SettingsError(f"{source}: {problem}") from error


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from "160x64". Raises SettingsError."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise SettingsError(f"size '{shown(text)}': expected WIDTHxHEIGHT, such as 160x64")
    return int(width), int(height)


def region_entry(text: str) -> dict[str, Any]:
    """A region as a table, from "left,top,right,bottom: prompt". Raises RegionError."""
    region = Region.parse(text)
    if not region.prompt:
        raise RegionError(f"region '{shown(text)}': its prompt is empty")
    return {"box": region.box, "prompt": region.prompt}


def from_options(path: Path | None, options: Mapping[str, Any]) -> Composition:
    """A composition from a YAML file (or none) and options as typed, which come first.

    `size` is "WIDTHxHEIGHT" and `regions` are texts there. Raises SettingsError, RegionError.
    """
    table = (read_table(path) if path else {}) | dict(options)
    if "size" in options:
        table["width"], table["height"] = parse_size(table.pop("size"))
    if "regions" in options:
        table["regions"] = [region_entry(text) for text in options["regions"]]
    return make_composition(table, str(path or "options"))


def picture_paths(path: Path, count: int) -> list[Path]:
    """Where `count` pictures go: `path`, or that name with numbers. Raises BadInputError when one cannot be written."""
    paths = [path if count == 1 else path.with_stem(f"{path.stem}-{number:03d}") for number in range(count)]
    for one in paths:
        refuse_unwritable(one)
    return paths


def compose(pipeline: MixOfShowPipeline, composition: Composition, *, progress: Progress = silent) -> list[Image.Image]:
    """Draw a composition's pictures; picture k is made from seed + k."""
    regions = [Region(entry.prompt, entry.box, entry.negative_prompt) for entry in composition.regions]
    images: list[Image.Image] = []
    for number in range(composition.num):
        # One at a time: in a batch, rounding depends on how many pictures are drawn together.
        images += pipeline(
            composition.prompt,
            regions=regions,
            negative_prompt=composition.negative_prompt,
            width=composition.width,
            height=composition.height,
            num_inference_steps=composition.steps,
            guidance_scale=composition.guidance_scale,
            seed=composition.seed + number,
            progress=_as_part(progress, number, composition.num),
        )
    return images


def _as_part(progress: Progress, number: int, count: int) -> Progress:
    """Progress of picture `number` out of `count` as progress of them all."""
    return lambda step, total, info: progress(number * total + step, count * total, info)


def save_picture(image: Image.Image, path: Path, composition: Composition, number: int = 0) -> None:
    """Write a PNG that carries the composition of just this picture."""
    alone = composition.model_copy(update={"seed": composition.seed + number, "num": 1})
    note = PngInfo()
    note.add_text(PNG_KEY, json.dumps(alone.model_dump(mode="json")))
    with writing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=note)


def composition_of(path: Path) -> Composition:
    """The composition that a PNG carries. Raises SettingsError when it carries none."""
    with Image.open(path, formats=("PNG",)) as image:
        text = image.info.get(PNG_KEY)
    if text is None:
        raise SettingsError(f"{path}: carries no composition")
    return make_composition(json.loads(text), str(path))
