"""Which place of a picture is redone, and with what: as its own composition has it, and as it is asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from mixofshow.errors import RegionError, SettingsError, shown
from mixofshow.progress import Progress, silent
from mixofshow.sampling.attention import visible
from mixofshow.sampling.composition import compose, from_options, make_composition, region_entry, usual, with_pictures
from mixofshow.sampling.inset import pixels_covered
from mixofshow.sampling.pictures import PictureSource, embedded, read_picture
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.regions import rescaled
from mixofshow.sampling.replay import carried
from mixofshow.sampling.settings import FINDING, Composition, Region

logger = logging.getLogger(__name__)

_NUMBER: Final = re.compile(r"\s*([0-9]{1,4})\s*(?::\s*(.*))?", re.DOTALL)
_IDLE: Final = {
    **dict.fromkeys(("upscale", "upscale_strength"), "the picture keeps its own size"),
    **dict.fromkeys(("mask", "auto", *FINDING), "the place is given"),
    "controls": "a place is redone without them",
    "isolate": "the place alone is drawn",
}
"""Settings of a composition that a picture cannot be redone with, and why."""
_OTHERS: Final = {
    **dict.fromkeys(("size", "width", "height"), "the picture keeps its own"),
    "regions": "the place is given",
    "image": "it is the picture that is redone",
    **_IDLE,
}
"""What else cannot be asked for: of these a picture that is redone has its own."""
_BROUGHT: Final = ("prompt", "negative_prompt", "strength", "concept_from", "adapters")
"""What a place has of the region that it lies in."""

Place = int | Region
"""A region by its number in the picture's composition, from 1, or a place; an empty prompt means that of what is there."""


def redo(
    pipeline: MixOfShowPipeline,
    picture: PictureSource,
    place: Place,
    *,
    progress: Progress = silent,
    **settings: Any,
) -> list[Image.Image]:
    """Pictures of which only one place is drawn over, enlarged, by its own concepts; see `redo_composition`.

    `settings` are those of Composition: `image_strength` is how far to go from what is there, `regional_lora` draws by
    the concepts' own weights, `seed` and `num` say which and how many there are. Raises SettingsError, RegionError,
    TokenError, BadInputError.
    """
    return compose(pipeline, redo_composition(picture, place, settings), progress=progress)


def redo_composition(
    picture: PictureSource, place: Place, settings: Mapping[str, Any] | None = None, before: Composition | None = None
) -> Composition:
    """The composition that redoes a place of a picture.

    What it was made from is told by the composition `before`, or else by the PNG itself, and `settings` come first. A
    region brings its prompts, adapters and its concepts' strength; a place without a prompt has those of the region that
    it shares most with, else the prompt of the whole. Raises as `redo` does.
    """
    given = dict(settings or {})
    for name, why in _OTHERS.items():
        if name in given:
            raise SettingsError(f"`{name}`: expected none with redo: {why}")
    image, before = read_picture(picture, "RGB"), before or carried(picture)
    asked = {key: given.pop(key) for key in ("prompt", "negative_prompt") if given.get(key)}
    if before and before.controls:
        logger.warning("controls are not followed where a place is redone")
    whole = before.model_dump() | usual("redo", *_IDLE) if before else {"prompt": "", **asked}
    made = make_composition(whole | given | {"image": embedded(image)}, "redo")
    size = made.width or image.width, made.height or image.height
    regions = tuple(rescaled(one, size, image.size) for one in made.regions)
    found = _filled(place, regions, made.prompt, asked, image)
    own = {"width": image.width, "height": image.height, "regions": regions, "redo": found}
    redone = made.model_copy(update=own)
    return with_pictures(redone, "redo", Path())


def from_redo_options(picture: Path, path: Path | None, options: Mapping[str, Any]) -> Composition:
    """The composition that redoes a place of a picture, from options as typed, a YAML in the stead of what the PNG says.

    The place is the only entry in `regions`, "2", "left,top,right,bottom", either with ": prompt" after it, or `mask`, a
    file. Raises as `redo` does.
    """
    settings = dict(options)
    places, mask = settings.pop("regions", []), settings.pop("mask", None)
    if (count := len(places) + (mask is not None)) != 1:
        ways = "`region` NUMBER, `region` left,top,right,bottom or `mask` FILE"
        raise SettingsError(f"redo: expected one place by {ways}, found {count}")
    if mask is not None:
        place: Place = Region("", mask=read_picture(mask, "L"))
    else:
        place, prompt = parse_place(places[0])
        settings |= {"prompt": prompt} if prompt else {}
    return redo_composition(picture, place, settings, from_options(path, {}) if path else None)


def parse_place(text: str) -> tuple[Place, str]:
    """A place, and the prompt for a numbered one: from "2" or "left,top,right,bottom", and perhaps ": prompt" after it.

    Raises RegionError.
    """
    if match := _NUMBER.fullmatch(text):
        return int(match[1]), match[2] or ""
    if ":" not in text:
        return Region.parse(f"{text}:"), ""
    return Region(**region_entry(text)), ""


def _filled(
    place: Place, regions: Sequence[Region], whole: str, asked: Mapping[str, Any], image: Image.Image
) -> Region:
    """The place, checked, with all that is missing of its prompts and concepts."""
    if isinstance(place, Region) and place.prompt:
        pixels_covered(place, image)
        own = place.negative_prompt
        return replace(place, negative_prompt=asked.get("negative_prompt") if own is None else own)
    if isinstance(place, bool) or not isinstance(place, int | Region):
        raise RegionError(f"place: expected a region's number or a Region, found {shown(place)}")
    if not isinstance(place, Region):
        if not 1 <= place <= len(regions):
            there = f"a number from 1 to {len(regions)}" if regions else "a box or a mask, the picture knows no regions"
            raise RegionError(f"region {place}: expected {there}")
        found = regions[place - 1]
        pixels_covered(found, image)
    else:
        under = _region_under(place, regions, image)
        found = replace(place, **({name: getattr(under, name) for name in _BROUGHT} if under else {"prompt": whole}))
    found = replace(found, **asked)
    if not found.prompt:
        raise RegionError(f"{found.title}: expected a prompt, which neither picture nor options say; give `prompt`")
    return found


def _region_under(place: Region, regions: Sequence[Region], image: Image.Image) -> Region | None:
    """The region that a place shares most with, where that is half of either."""
    cover = pixels_covered(place, image)
    if not regions:
        return None
    seen = visible(torch.stack([pixels_covered(one, image) for one in regions]), [one.front for one in regions])
    shared = (seen * cover).sum((1, 2))
    most = int(shared.argmax())
    return regions[most] if shared[most] >= 0.5 * min(cover.sum(), seen[most].sum()) else None
