"""A page about one fusion: how well each concept is kept, in which layers it is not, and what it costs the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from PIL import Image, ImageDraw

from mixofshow.concepts.manifest import Manifest
from mixofshow.evaluation.report import Page
from mixofshow.fusion.recording import STAGES, Stage, stage_of
from mixofshow.fusion.solving import Kept, LayerReport, share, total
from mixofshow.fusion.stages import Fused
from mixofshow.grids import grid, label

STAGE_NAMES: Final[Mapping[Stage, str]] = {
    "text": "text encoder",
    "keys-and-values": "keys and values",
    "picture": "the rest of the UNet",
}
WORST: Final = 10
WIDTH: Final = 880
HEIGHT: Final = 26
WIDEST: Final = 14
"""Pixels: of the heat map, of its rows, and the widest column."""
DARK: Final = (8, 48, 107)
BEYOND: Final = (165, 15, 21)
UNTOUCHED: Final = (236, 236, 236)

Reports = Mapping[str, LayerReport]


def fusion_page(fused: Fused) -> Page:
    """Everything that a fusion tells about itself."""
    page = Page(f"How well {len(fused.model.concepts)} concepts were fused")
    page.heading("The concepts")
    if fused.recorded:
        page.paragraph(
            "What fusion leaves undone of the change that each concept wants, on the inputs that were recorded: "
            "0 is perfect, 1 as if it had not been fused."
        )
        page.table(*concept_table(fused))
    else:
        page.paragraph("This method looks at no inputs, so nothing was recorded and measured (measure: true does).")
    for name, one in fused.voices.items():
        page.paragraph(f"<{name}>: {one.why}.")
    if fused.refitted:
        _refitted(page, fused.refitted)
    if fused.recorded:
        _layers(page, fused)
    page.heading("Settings")
    page.table(("setting", "value"), list(_settings(fused.model.manifest)))
    return page


def _refitted(page: Page, refitted: Mapping[str, tuple[float, float]]) -> None:
    page.heading("Refitted")
    page.paragraph(
        "The mean squared difference of the fused model's predictions from those of the concept's own model. All other "
        "numbers here are of the fusion before."
    )
    rows = [(f"<{name}>", f"{before:.3g}", f"{after:.3g}") for name, (before, after) in refitted.items()]
    page.table(("concept", "fused", "refitted"), rows)


def _layers(page: Page, fused: Fused) -> None:
    page.heading("Every concept in every layer")
    names = [concept.info.name for concept in fused.model.concepts]
    page.figure(
        heat_map(names, fused.layers),
        "Layers from left to right in the order in which a picture passes them. White: nothing is left undone; dark: "
        "all of it; red: more than if it had not been fused; grey: the concept leaves this layer alone.",
        scale=1,
    )
    page.heading(f"The {min(WORST, len(fused.layers))} worst layers")
    page.table(
        ("layer", "left undone", "by weight fusion", "most of it"),
        [
            (name, _number(one.residual), _number(share(one.average, one.unchanged)), f"<{_sufferer(one)}>")
            for name, one in worst_layers(fused.layers)
        ],
    )


def concept_table(fused: Fused) -> tuple[Sequence[str], list[list[str]]]:
    """Head and rows: each concept's residual over all layers and by stage; what it costs the others, if measured."""
    stages = _by_stage(fused.layers)
    measured = any(kept.others_without for one in fused.layers.values() for kept in one.concepts.values())
    head = ["concept", "all layers", *(STAGE_NAMES[stage] for stage in stages)]
    rows = []
    for concept in fused.model.concepts:
        name = concept.info.name
        over = [total(part.values(), name) for part in (fused.layers, *stages.values())]
        row = [f"<{name}>", *(_number(share(kept.left, kept.wanted)) for kept in over)]
        rows.append([*row, _percent(cost(over[0]))] if measured else row)
    return [*head, "costs the others"] if measured else head, rows


def cost(kept: Kept) -> float:
    """By how much the others' residual rises through a concept: 0.1 is by a tenth; 0 where it was not measured."""
    return math.sqrt(kept.others / kept.others_without) - 1 if kept.others_without > 0 else 0.0


def worst_layers(layers: Reports) -> list[tuple[str, LayerReport]]:
    """Those that leave most undone, the worst first."""
    return sorted(layers.items(), key=lambda item: -item[1].residual)[:WORST]


def heat_map(names: Sequence[str], layers: Reports) -> Image.Image:
    """Residuals, a row for each concept and a column for each layer, stage beside stage, above their scale."""
    stages = _by_stage(layers)
    width = max(3, min(WIDEST, WIDTH // len(layers)))
    strips = [
        _strip([_colour(one.concepts[name]) for one in part.values()], width)
        for name in names
        for part in stages.values()
    ]
    heads = [f"{STAGE_NAMES[stage]} ({len(part)})" for stage, part in stages.items()]
    rows = [f"<{name}>" for name in names]
    sheet = grid(strips, len(stages), gap=4, row_labels=rows, column_labels=heads, text_size=HEIGHT // 2)
    shades = _strip([_shade(k / 50) for k in range(51)], 4)
    scale = grid([label("0", HEIGHT // 2), shades, label("1", HEIGHT // 2)], 3, gap=4)
    return grid([sheet, scale], 1, gap=HEIGHT)


def _by_stage(layers: Reports) -> dict[Stage, dict[str, LayerReport]]:
    found = {stage: {name: one for name, one in layers.items() if stage_of(name) == stage} for stage in STAGES}
    return {stage: part for stage, part in found.items() if part}


def _strip(colours: Sequence[tuple[int, int, int]], width: int) -> Image.Image:
    """Colours side by side in a frame, each so many pixels wide."""
    picture = Image.new("RGB", (len(colours) * width + 2, HEIGHT), (200, 200, 200))
    draw = ImageDraw.Draw(picture)
    for number, colour in enumerate(colours):
        left = 1 + number * width
        draw.rectangle((left, 1, left + width - 1, HEIGHT - 2), fill=colour)
    return picture


def _colour(kept: Kept) -> tuple[int, int, int]:
    if kept.wanted == 0:
        return UNTOUCHED
    residual = share(kept.left, kept.wanted)
    return BEYOND if residual > 1 else _shade(residual)


def _shade(residual: float) -> tuple[int, int, int]:
    """White at 0, dark at 1."""
    red, green, blue = (round(255 + (end - 255) * residual) for end in DARK)
    return red, green, blue


def _sufferer(report: LayerReport) -> str:
    return max(report.concepts, key=lambda name: report.concepts[name].left)


def _settings(manifest: Manifest) -> Iterable[tuple[str, str]]:
    yield "base", manifest.base
    for key, value in manifest.settings.items():
        yield key.replace("_", " "), _shown(value)


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={one}" for key, one in value.items())
    return ", ".join(f"“{one}”" for one in value) if isinstance(value, list) else str(value)


def _number(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"
