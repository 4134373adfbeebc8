"""A page about one fusion: how well each concept is kept, in which layers it is not, and what it costs the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mixofshow.evaluation.report import number, write_page
from mixofshow.fusion.recording import STAGES, Stage, stage_of
from mixofshow.fusion.solving import ConceptResidual, LayerReport, share, total
from mixofshow.fusion.stages import Fused

STAGE_NAMES: Final[Mapping[Stage, str]] = {
    "text": "text encoder",
    "keys-and-values": "keys and values",
    "picture": "the rest of the UNet",
}
WORST: Final = 10
DARK: Final = "rgb(8 48 107 / {:.2f})"
BEYOND: Final = "rgb(165 15 21)"
UNTOUCHED: Final = "rgb(236 236 236)"
"""Colours of the heat map; the first, on white, is as dense as the residual is large."""


def write_fusion_report(path: Path, fused: Fused) -> None:
    """Everything that a fusion tells about itself, as one page."""
    said = fused.model.manifest
    taken = [(f"<{one.name}> was made for", one.made_for) for one in said.concepts if one.made_for]
    worst = sorted(fused.layers.items(), key=lambda item: -item[1].residual)[:WORST]

    def row(name: str, one: LayerReport) -> tuple[str, ...]:
        sufferer = max(one.concepts, key=lambda name: one.concepts[name].residual_sq)
        return name, number(one.residual), number(share(one.average, one.unchanged)), f"<{sufferer}>"

    write_page(
        path,
        "fusion.html.j2",
        fused=fused,
        table_of_concepts=concept_table(fused),
        stages={STAGE_NAMES[stage]: part for stage, part in _by_stage(fused.layers).items()},
        shade=shade,
        worst=[row(name, one) for name, one in worst] if fused.recorded else [],
        settings=[*((key.replace("_", " "), _shown(value)) for key, value in said.settings.items()), *taken],
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
        row = [f"<{name}>", *(number(share(kept.residual_sq, kept.target_sq)) for kept in over)]
        rows.append([*row, f"{100 * cost(over[0]):+.1f} %"] if measured else row)
    return [*head, "costs the others"] if measured else head, rows


def cost(kept: ConceptResidual) -> float:
    """By how much the others' residual rises through a concept: 0.1 is by a tenth; 0 where it was not measured."""
    return math.sqrt(kept.others / kept.others_without) - 1 if kept.others_without > 0 else 0.0


def shade(kept: ConceptResidual) -> str:
    """The colour of a concept in a layer: white where nothing is left undone, dark where all is, red beyond that."""
    residual = share(kept.residual_sq, kept.target_sq)
    return UNTOUCHED if kept.target_sq == 0 else BEYOND if residual > 1 else DARK.format(residual)


def _by_stage(layers: Mapping[str, LayerReport]) -> dict[Stage, dict[str, LayerReport]]:
    found = {stage: {name: one for name, one in layers.items() if stage_of(name) == stage} for stage in STAGES}
    return {stage: part for stage, part in found.items() if part}


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={one}" for key, one in value.items())
    return ", ".join(f"“{one}”" for one in value) if isinstance(value, list) else str(value)
