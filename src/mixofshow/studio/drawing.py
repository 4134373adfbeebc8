"""Drawing what is composed: with which model, by which command, as a job with previews."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from mixofshow.concepts.interchange.importing import read_ahead
from mixofshow.errors import SettingsError, shown
from mixofshow.sampling.composition import from_options, make_composition
from mixofshow.sampling.drawing import draw_pictures, drawn_together, known_words, open_pipeline, require_known_words
from mixofshow.sampling.inputs import Callback
from mixofshow.sampling.latents import decode
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.settings import Composition
from mixofshow.studio.commands import line
from mixofshow.studio.jobs import Job
from mixofshow.studio.shelf import Card, cards, named_in
from mixofshow.studio.workspace import Workspace

OWN: Final = "each region by its own concept (nothing to fuse)"
"""The choice beside the names of fused models."""
PREVIEW_SECONDS: Final = 0.7


@dataclass(frozen=True)
class Order:
    """One picture to draw: the composition's file, with which model, or with which concept files on the base."""

    file: Path
    model: Path | None = None
    concepts: tuple[Path, ...] = ()

    @property
    def target(self) -> Path:
        """Where the picture goes."""
        return self.file.with_suffix(".png")


def order(workspace: Workspace, file: Path, composition: Composition, drawn_by: str) -> Order:
    """How to draw a composition: by a fused model, or by the concepts that its prompts name. Raises SettingsError."""
    if drawn_by != OWN:
        if drawn_by not in workspace.model_names():
            raise SettingsError(f"no fused model is called '{shown(drawn_by)}'; fuse it under Concepts")
        return Order(file, model=workspace.models / drawn_by)
    return Order(file, concepts=tuple(card.path for card in named_in(composition, cards(workspace))))


def check(workspace: Workspace, one: Order, composition: Composition) -> None:
    """Raise SettingsError, TokenError for what could not be drawn, before anything is written or loaded."""
    drawn_together(one.concepts, composition)
    model = str(one.model) if one.model else workspace.base
    require_known_words(composition, known_words(model, [read_ahead(path) for path in one.concepts]))


def command(workspace: Workspace, one: Order) -> str:
    """The command line that gives the same bytes, for a shell in the workspace's folder."""
    words = ["sample", workspace.shown(one.file)]
    if one.model:
        words += ["--model", workspace.shown(one.model)]
    else:
        words += ["--base", workspace.base]
        words += [word for path in one.concepts for word in ("--concept", workspace.shown(path))]
    return line(workspace, *words, "--out", "picture.png")


@dataclass
class Engine:
    """The model that drew last, kept for the next picture. Only the jobs' thread uses it."""

    workspace: Workspace
    _key: Any = None
    _pipeline: MixOfShowPipeline | None = field(default=None, repr=False)

    def pipeline(self, one: Order, composition: Composition) -> MixOfShowPipeline:
        """The model of an order, loaded if it is another than last time. Raises as `open_pipeline` does."""
        files = [*one.concepts, *([one.model / "concepts.json"] if one.model else [])]
        key = (one.model, one.concepts, composition.regional_lora, [os.stat(file).st_mtime_ns for file in files])
        if self._pipeline is None or key != self._key:
            self.forget()
            model, base = (str(one.model), self.workspace.base) if one.model else (self.workspace.base, None)
            how: dict[str, Any] = {"regional_lora": composition.regional_lora, "composition": composition}
            self._pipeline = open_pipeline(model, base=base, concepts=one.concepts, **how, **self.workspace.loading)
            self._key = key
        return self._pipeline

    def forget(self) -> None:
        """Make room."""
        self._key = self._pipeline = None


def draw(engine: Engine, orders: Sequence[Order], job: Job) -> list[Path]:
    """Draw them one after another, as `mixofshow sample` does. What is stopped leaves the ones that are done."""
    try:
        for number, one in enumerate(orders):
            _draw(engine, one, job, (number, len(orders)))
            job.results = (*job.results, one.target)
    finally:
        for one in orders[len(job.results) :]:  # of what no picture came of, nothing stays
            one.file.unlink(missing_ok=True)
    return list(job.results)


def _draw(engine: Engine, one: Order, job: Job, place: tuple[int, int]) -> None:
    """One of them; its `place` is (how many were drawn before, how many there are)."""
    files, composition = drawn_together(list(one.concepts), from_options(one.file, {}))
    pipeline = engine.pipeline(replace(one, concepts=tuple(files)), composition)

    def progress(step: int, total: int, info: Any) -> None:
        job.progress(place[0] * total + step, place[1] * total, info)

    draw_pictures(pipeline, composition, [one.target], progress=progress, step_end=previews(job))


def previews(job: Job) -> Callback:
    """A callback that shows the picture as it forms, every so often."""
    last = [time.monotonic()]

    def step_end(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """Decode what is there of the first picture."""
        if time.monotonic() - last[0] > PREVIEW_SECONDS:
            (job.preview,) = decode(pipeline, tensors["latents"][:1])
            last[0] = time.monotonic()
        return {}

    return step_end


def draw_portraits(engine: Engine, job: Job) -> list[Path]:
    """A picture of each concept on the shelf that has none, beside its file."""
    missing = [card for card in cards(engine.workspace) if card.portrait is None]
    for number, card in enumerate(missing):
        composition = make_composition({"prompt": f"a photo of a {card.word}"})
        pipeline = engine.pipeline(Order(card.path, concepts=(card.path,)), composition)
        draw_pictures(pipeline, composition, [card.path.with_suffix(".png")])
        job.progress(number + 1, len(missing), {})
    return [card.path.with_suffix(".png") for card in missing]


def shelf_of(workspace: Workspace, drawn_by: str) -> list[Card]:
    """The concepts that a way of drawing knows: all of the shelf's, or those of a fused model."""
    from mixofshow.concepts.manifest import read_manifest

    shelf = cards(workspace)
    if drawn_by == OWN:
        return shelf
    names = read_manifest(workspace.models / drawn_by).hashes if drawn_by in workspace.model_names() else {}
    return [card for card in shelf if card.name in names]
