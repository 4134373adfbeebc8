"""Files from and to other tools, as `mixofshow convert` does it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mixofshow.concepts.changes import Change, Full, LowRank
from mixofshow.concepts.concept import Concept
from mixofshow.concepts.delta import compressed
from mixofshow.concepts.interchange.cards import fidelity, rounding
from mixofshow.concepts.interchange.exporting import export_concept
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ConvertSettings
from mixofshow.outputs import check_outputs


def convert(source: Path, target: Path, pipeline: Any, settings: ConvertSettings) -> list[str]:
    """Read a concept of ours or another tool's, write it as `settings.to` says, and say in lines what came of it."""
    check_target(source, target, settings)
    concept = open_concept(source, pipeline, settings)
    if settings.to == "concept":
        concept.save(target)
        rounded = f"rounded to half precision, relative error {half_precision_error(concept):.2g}"
        typed = f"<{concept.info.name}>"
        words = typed if concept.prompt == typed else f"{typed} ({concept.prompt})"
        return [f"{target}: {words}, {len(concept.deltas)} layers, {rounded}"]
    done = export_concept(concept, pipeline, target, settings.to, settings.rank)
    lora = [f"{target / done.lora}: {len(concept.deltas)} layers, {rounding(done.changes)}"] if concept.deltas else []
    return [*lora, f"{target / done.embeddings}: {concept.prompt}. {fidelity(done.words)}"]


def check_target(source: Path, target: Path, settings: ConvertSettings, also_read: Iterable[Path] = ()) -> None:
    """Raise BadInputError or ResourceError unless the target can be written, over nothing that is read."""
    file, folder = (target, None) if settings.to == "concept" else (None, target)
    check_outputs(files={"safetensors": [file]}, folders=[folder], inputs=[source, settings.embeddings, *also_read])


def half_precision_error(concept: Concept) -> float:
    """Relative error of the changes as a concept file keeps them, in half precision; 0 without any."""
    changes = ((name, one.matrix(dtype=torch.float64)) for name, one in concept.deltas.items())
    return compressed(changes, cut=lambda name, _: _halved(concept.deltas[name]))[1].overall


def _halved(change: Change) -> Change:
    if isinstance(change, LowRank):
        return LowRank(change.down.half(), change.up.half())
    return Full(change.change.half())
