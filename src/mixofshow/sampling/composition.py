"""A composition: everything that a picture is made from, as YAML and in the PNG itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

from PIL import Image

from mixofshow.bases.memory import drawn_at_once
from mixofshow.errors import RegionError, SettingsError, nearest, shown
from mixofshow.progress import Progress, as_part, silent
from mixofshow.reading import named_in, parse_table, read_table
from mixofshow.sampling.finding import Layout
from mixofshow.sampling.inputs import Callback
from mixofshow.sampling.inset import draw_inset
from mixofshow.sampling.pictures import PictureSource, embedded, is_embedded, read_picture
from mixofshow.sampling.pipeline import MixOfShowPipeline, PipelineOutput, joined
from mixofshow.sampling.settings import AUTO, ENTRIES, FINDING, Composition, Region
from mixofshow.sampling.steering import open_controls, with_known_controls

logger = logging.getLogger(__name__)

_SIZE: Final = re.compile(r"([0-9]{1,5})[xX]([0-9]{1,5})")
_LORA: Final = re.compile(r"<lora:([\w.-]{1,64}?)(?::(-?[0-9]*\.?[0-9]+))?>")
NAMING: Final = ("image", "mask", "picture", "network", "strength_map")
"""Keys, in a composition and in its lists, whose values name files."""


def make_composition(table: Mapping[str, Any], source: str = "composition", folder: Path | None = None) -> Composition:
    """A checked composition; pictures that it names, relative to the folder, become part of it.

    Without a folder no file is read: then the pictures must be part of it already. Raises SettingsError naming the
    field and the nearest known one, RegionError, BadInputError for a picture.
    """
    made = with_pictures(Composition.of(table, source), source, folder)
    made.require_drawable()
    return with_known_controls(made, source, folder)


def with_pictures(composition: Composition, source: str, folder: Path | None) -> Composition:
    """The composition with the pictures that it names in the place of their names."""

    def read(given: PictureSource | None, mode: str) -> Any:
        if given is None or is_embedded(given):
            return given
        if isinstance(given, Image.Image):
            return embedded(read_picture(given, mode))
        if folder is None:
            raise SettingsError(f"{source}: expected the picture itself, found a file's name, '{shown(given)}'")
        return embedded(read_picture(named_in(folder, given), mode))

    def place(region: Region) -> Region:
        return replace(region, mask=read(region.mask, "L"))

    pictures = {"image": read(composition.image, "RGB"), "mask": read(composition.mask, "L")}
    regions, redo = map(place, composition.regions), composition.redo and place(composition.redo)
    return composition.model_copy(update={"regions": tuple(regions), "redo": redo, **pictures})


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from "160x64". Raises SettingsError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise SettingsError(f"size '{shown(text)}': expected WIDTHxHEIGHT in pixels, such as 160x64")
    return int(match[1]), int(match[2])


def region_entry(text: str) -> dict[str, Any]:
    """A region as a table, from the text that Region.parse takes, as A1111 has it with `<lora:name:strength>` for its LoRAs.

    Raises RegionError.
    """
    region = Region.parse(text)
    place: dict[str, Any] = {"auto": True} if region.auto else {"box": region.box}
    adapters = {name: float(strength or 1) for name, strength in _LORA.findall(region.prompt)}
    prompt = " ".join(_LORA.sub(" ", region.prompt).split()) if adapters else region.prompt
    if not prompt:
        raise RegionError(f"region '{shown(text)}': its prompt is empty")
    return place | {"prompt": prompt} | ({"adapters": adapters} if adapters else {})


def control_entry(text: str) -> dict[str, Any]:
    """A control as a table, from "network: NAME, picture: FILE, strength: 0.8": keys as in YAML. Raises SettingsError."""
    table = parse_table(f"{{{text}}}", f"control '{shown(text)}'")
    # Files are named from here, but the composition's are named from beside its YAML.
    files = {
        key: named_in(Path(), table[key])
        for key in ("network", "picture", "strength_map")
        if isinstance(table.get(key), str)
    }
    # A network's name is a folder's, or is known without one.
    return table | {key: str(file.absolute()) for key, file in files.items() if key != "network" or file.is_dir()}


def from_options(path: Path | None, options: Mapping[str, Any]) -> Composition:
    """A composition from a YAML file (or none) and options as typed, which come first.

    `size` is "WIDTHxHEIGHT", `regions` and `controls` are texts, `image` and `mask` are files from here. Raises
    SettingsError, RegionError.
    """
    made = make_composition(_table(path, options), str(path or "options"), path.parent if path else Path())
    for region in made.regions:
        region.require_its_steps(*made.steps_done(from_image=made.image is not None))
    return made


def inputs_of(path: Path | None, options: Mapping[str, Any]) -> list[Path]:
    """The files that `from_options` reads: the YAML, and the pictures and networks that it or the options name."""
    table, folder = _table(path, options, quiet=True), path.parent if path else Path()
    lists = [listed for key in ENTRIES if isinstance(listed := table.get(key), list)]
    entries = [table, *chain.from_iterable(lists)]
    names = [entry.get(key) for entry in entries if isinstance(entry, Mapping) for key in NAMING]
    named = [named_in(folder, name) for name in names if isinstance(name, str) and not is_embedded(name)]
    return [path, *named] if path else named


def _table(path: Path | None, options: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    table = {**(read_table(path) if path else {})}
    table = Composition.renamed(table, quiet=quiet) | Composition.renamed(options, quiet=quiet)
    if "size" in options:
        table["width"], table["height"] = parse_size(table.pop("size"))
    if "regions" in options:
        table["regions"] = [region_entry(text) for text in options["regions"]]
    if "controls" in options:
        table["controls"] = [control_entry(text) for text in options["controls"]]
    for key in ("image", "mask"):
        if key in options:
            table[key] = str(Path(options[key]).absolute())
    return table


def picture_paths(path: Path, count: int) -> list[Path]:
    """Where `count` pictures go: `path`, or that name with numbers."""
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{k:03d}{path.suffix}") for k in range(count)]


def compose(
    pipeline: MixOfShowPipeline,
    composition: Composition,
    *,
    at_once: bool = False,
    progress: Progress = silent,
    step_end: Callback | None = None,
) -> PipelineOutput:
    """Draw a composition's pictures; picture k is made from seed + k.

    They are drawn one at a time, for rounding depends on how many are drawn together; `at_once`, in batches as large as
    fit, is quicker. `step_end` is diffusers' `callback_on_step_end`. Of places that are found, the output has the
    `layouts`. Raises BadInputError.
    """
    if composition.redo is not None:
        return PipelineOutput(_redone(pipeline, composition, progress))
    if "redo_margin" in composition.changed:
        logger.warning("`redo_margin` changes nothing without `redo`")
    start = read_picture(composition.image, "RGB") if composition.image else None
    size = composition.size(pipeline, start)
    controls = open_controls(composition, pipeline, size)
    mask = read_picture(composition.mask, "L") if composition.mask else None

    def drawn(number: int, count: int, progress: Progress) -> PipelineOutput:
        """Pictures from this one on, so many in one batch."""
        return pipeline(
            composition.prompt,
            regions=[*composition.regions, *[AUTO] * composition.auto],
            negative_prompt=composition.negative_prompt,
            num_images_per_prompt=count,
            image=start,
            mask_image=mask,
            seed=composition.seed + number,
            regional_lora=composition.regional_lora,
            controls=controls,
            callback_on_step_end=step_end,
            progress=progress,
            **composition.settings,
        )

    many = drawn_at_once(pipeline, *(round(side * composition.upscale) for side in size)) if at_once else 1
    starts = range(0, composition.num, many)
    return joined(
        [
            drawn(first, min(many, composition.num - first), as_part(progress, number, len(starts)))
            for number, first in enumerate(starts)
        ]
    )


def _redone(pipeline: MixOfShowPipeline, composition: Composition, progress: Progress) -> list[Image.Image]:
    """The picture whose place is drawn over, from each of the seeds."""
    count = composition.num
    seeds = [composition.model_copy(update={"seed": composition.seed + number}) for number in range(count)]
    return [draw_inset(pipeline, one, progress=as_part(progress, number, count)) for number, one in enumerate(seeds)]


def settled(composition: Composition, layout: Layout | None) -> Composition:
    """The composition whose regions have the places that were found; it draws the same picture."""
    if layout is None:
        return composition
    found = {"prompt": layout.prompt, "regions": layout.regions}
    return composition.model_copy(update=found | usual("auto", *FINDING))


def usual(*names: str) -> dict[str, Any]:
    """The defaults of settings of a composition."""
    return {name: Composition.model_fields[name].default for name in names}


def variations(composition: Composition, text: str | None) -> Iterator[tuple[str, Composition]]:
    """The composition with each value of a setting, labelled, from "key=value,value"; without a text, as it is.

    Raises SettingsError.
    """
    if text is None:
        yield "", composition
        return
    key, _, values = text.partition("=")
    (key,) = Composition.renamed({key: values}) or (key,)
    if key not in Composition.model_fields or not values:
        hint = nearest(key, Composition.model_fields)
        raise SettingsError(f"'{shown(text)}': expected KEY=VALUE,VALUE of a setting{hint}")
    for value in values.split(","):
        yield f"{key} {value}", make_composition(composition.model_dump() | {key: value}, f"'{shown(text)}'")
