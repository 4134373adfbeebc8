"""The region editor: a component of our own, whose value is a composition's size and regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from pydantic import TypeAdapter

from mixofshow.errors import MixOfShowError, SettingsError, shown
from mixofshow.images import read_image
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.pictures import embedded
from mixofshow.sampling.regions import coverage, shape_of
from mixofshow.sampling.settings import Composition, Region
from mixofshow.studio import web as gr
from mixofshow.studio.forms import Field, fields_of
from mixofshow.studio.shelf import Card
from mixofshow.studio.web import source

SCRIPTS: Final = ("make.js", "editor.js", "canvas.js", "panel.js")
BY_ITSELF: Final = ("prompt", "box", "polygon", "mask", "units", "adapters")
"""Of a region's settings, those that the canvas and the list have places for, or that no form can ask."""
LARGEST_SIDE: Final = 1024
"""Of the picture under the regions, in pixels."""
TYPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "whole": {"type": "number", "step": 1},
    "number": {"type": "number", "step": "any"},
    "text": {"type": "text"},
    "switch": {"type": "checkbox"},
}
"""How a browser asks for each kind; any other is typed as text."""


def region_editor(tool: str = "select", **props: Any) -> Any:
    """The component. Its value is {width, height, regions}; `input` is its event for whatever a person does there.

    The `tool` is that to begin with. With `composes` regions have prompts, settings, and a button for the event
    `draw_over`, which names one by its number; else they are shapes.
    """
    return _component(
        "editor",
        f'const FIRST_TOOL = "{tool}";\n{source(*SCRIPTS)}',
        fields=region_fields(),
        **{"elem_id": "editor", "value": blank((64, 64)), "cards": [], "advice": [], "picture": "", **props},
    )


def concept_shelf(**props: Any) -> Any:
    """Cards to be ticked. Its value is {word: strength} of those that are; `input` is its event."""
    return _component("shelf", source("make.js", "shelf.js"), **{"elem_id": "shelf", "value": {}, "cards": [], **props})


def picture_grid(**props: Any) -> Any:
    """Pictures with captions to edit. Its value is what `tuning.grid` says; its events `caption`, `paint`, `away` name one."""
    return _component("pictures", source("make.js", "pictures.js"), **{"elem_id": "tune-pictures", "value": [], **props})


def _component(name: str, script: str, **props: Any) -> Any:
    """Gradio's component of our own HTML and CSS of this name, with this script and these properties."""
    page, style = source(f"{name}.html"), source(f"{name}.css")
    return gr.HTML(html_template=page, css_template=style, js_on_load=script, apply_default_css=False, **props)


def region_fields() -> list[dict[str, Any]]:
    """The settings of a region that the list asks, from its schema."""
    schema = TypeAdapter(Region).json_schema()
    return [_asked(one) for one in fields_of(schema, leave_out=BY_ITSELF)]


def _asked(field: Field) -> dict[str, Any]:
    fallback = "" if field.default is None else str(field.default)
    bounds = {"min": field.minimum, "max": field.maximum}
    return {
        "key": field.key,
        "label": field.label,
        "fallback": fallback,
        **bounds,
        **TYPES.get(field.kind, TYPES["text"]),
    }


def value_of(composition: Composition, size: tuple[int, int]) -> dict[str, Any]:
    """What the editor shows of a composition on a picture of (width, height): boxes and polygons in shares of it."""
    width, height = size
    dumped = composition.model_dump(mode="json", include={"regions"}, exclude_defaults=True).get("regions", [])
    regions = [_in_shares(one, table, width, height) for one, table in zip(composition.regions, dumped, strict=True)]
    return {"width": width, "height": height, "regions": regions}


def blank(size: tuple[int, int]) -> dict[str, Any]:
    """The editor's value without regions, for (width, height)."""
    return {"width": size[0], "height": size[1], "regions": []}


def _in_shares(region: Region, table: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    numbers = [*(region.box or ()), *(one for point in region.polygon or () for one in point)]
    across = (1, 1) if region.in_shares(max(numbers, default=0)) else (width, height)
    found = {**table, "units": "share"}
    if region.box:
        found["box"] = [number / across[place % 2] for place, number in enumerate(region.box)]
    if region.polygon:
        found["polygon"] = [[x / across[0], y / across[1]] for x, y in region.polygon]
    if region.feather and not region.in_shares(region.feather):
        found["feather"] = region.feather / min(width, height)
    return found


def regions_of(value: Any) -> list[dict[str, Any]]:
    """The regions in the editor's value, which may be anybody's. Raises SettingsError for what cannot be one."""
    regions = value.get("regions") if isinstance(value, Mapping) else None
    if not isinstance(regions, list) or not all(isinstance(one, Mapping) for one in regions):
        raise SettingsError(f"regions: expected a list of tables, found {shown(regions)}")
    return [dict(one) for one in regions]


def painted(value: Any, size: tuple[int, int]) -> Image.Image:
    """What is inside of any region of the editor's value: white on black, of (width, height).

    Raises SettingsError, RegionError.
    """
    table = {"prompt": "", "regions": [{"prompt": "", **one} for one in regions_of(value)]}
    regions = make_composition(table, "painted").regions
    if not regions:
        raise SettingsError("nothing is painted yet: use the brush, or a box or polygon")
    width, height = size
    covers = [coverage(shape_of(one, width=width, height=height), columns=width, rows=height) for one in regions]
    return Image.fromarray((torch.stack(covers).amax(0) * 255).round().to(torch.uint8).numpy())


def cards_for(cards: Sequence[Card], side: int = 64) -> list[dict[str, Any]]:
    """What the page is told of concepts, their pictures at most so large; all of it is only ever shown as text."""
    return [
        {
            "word": card.word,
            "prompt": f"a photo of a {card.word}",
            "title": card.facts,
            "picture": thumbnail(card.portrait, side) if card.portrait else "",
        }
        for card in cards
    ]


def thumbnail(path: Path, side: int = LARGEST_SIDE) -> str:
    """A picture as a text that a page shows, at most so large; empty for what cannot be read: people put files there."""
    try:
        return shrunk(read_image(path, shown(path.name)).image, side)
    except MixOfShowError:
        return ""


def shrunk(image: Image.Image, side: int = LARGEST_SIDE) -> str:
    """The same of one in memory."""
    small = image.copy()
    small.thumbnail((side, side))
    return embedded(small)
