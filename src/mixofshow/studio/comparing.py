"""One composition drawn in every way there is, on one seed: by own weights, by weight fusion, by models, without regions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.manifest import MANIFEST, read_manifest
from mixofshow.errors import MixOfShowError
from mixofshow.sampling.settings import Composition
from mixofshow.studio.compose import Studio, written
from mixofshow.studio.drawing import OWN, check, draw, order
from mixofshow.studio.fusing import LONGEST_NAME, fused_into
from mixofshow.studio.jobs import Job
from mixofshow.studio.shelf import Card, cards, named_in

MOST_WAYS: Final = 4
"""Models that a comparison draws by, at most."""
WEIGHTS: Final = "weight-fusion"
"""How the models' names begin that are fused for comparisons: the baseline, which averages changes of weights."""


def start_comparing(studio: Studio, composition: Composition, drawn_by: str) -> Job:
    """A job that draws the first picture in every way there is; of the concepts that it names it fuses weights first.

    Raises SettingsError, TokenError where not even the way that was chosen can draw it.
    """
    workspace = studio.workspace
    alone = composition.model_copy(update={"num": 1})
    check(workspace, order(workspace, workspace.canvas, alone, drawn_by), alone)

    def work(job: Job) -> list[Path]:
        named = named_in(alone, cards(workspace))
        weights = [by_weights(studio, named, job)] if named else []
        ways = list(dict.fromkeys([drawn_by, OWN, *weights, *workspace.model_names()]))[:MOST_WAYS]
        plain = alone.model_copy(update={"regions": ()})
        wanted = [(_called(way), alone, way) for way in ways]
        wanted += [(f"without regions, {_called(way)}", plain, way) for way in ways if alone.regions and not alone.redo]
        possible = [one for one in wanted if _can_draw(studio, one[1], one[2])]
        orders = written(studio, [(one, way) for _, one, way in possible])
        job.facts = list(zip((one.target for one in orders), (label for label, _, _ in possible), strict=True))
        return draw(studio.engine, orders, job)

    return studio.jobs.submit("draw", "drawing it in every way, to compare", work)


def by_weights(studio: Studio, named: Sequence[Card], job: Job) -> str:
    """The name of the model that weight fusion makes of these concepts; it is made unless it is there, and up to date."""
    name = "-".join([WEIGHTS, *(card.name for card in named)])[:LONGEST_NAME].rstrip("-_")
    folder = studio.workspace.models / name
    hashes = {card.name: load_concept(card.path).hash for card in named}
    if not (folder / MANIFEST).is_file() or dict(read_manifest(folder).hashes) != hashes:
        studio.engine.forget()
        fused_into(studio.workspace, folder, [card.path for card in named], {"method": "average"}, job)
    return name


def _called(way: str) -> str:
    if way == OWN:
        return "each region by its own concept"
    return "by weight fusion" if way.startswith(WEIGHTS) else f"by {way}"


def _can_draw(studio: Studio, composition: Composition, way: str) -> bool:
    """Whether this way knows all words, and has any concept to draw."""
    try:
        asked = order(studio.workspace, studio.workspace.canvas, composition, way)
        check(studio.workspace, asked, composition)
    except MixOfShowError:
        return False
    return bool(asked.model or asked.concepts)
