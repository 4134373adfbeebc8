"""Fusing what is on the shelf: what it will cost, the job, and what is kept of each concept."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Final

from mixofshow.errors import SettingsError, shown
from mixofshow.evaluation.fusion_report import write_fusion_report
from mixofshow.fusion.jobs import make_job
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.solving import looks_at_inputs, share, total
from mixofshow.fusion.stages import Fused, fuse
from mixofshow.outputs import check_outputs, write_text
from mixofshow.studio.commands import line, options
from mixofshow.studio.compose import Studio
from mixofshow.studio.forms import Field, fields_of
from mixofshow.studio.jobs import Job
from mixofshow.studio.shelf import Card, cards
from mixofshow.studio.web import many
from mixofshow.studio.workspace import Workspace

KIND: Final = "fuse"
LONGEST_NAME: Final = 40
NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{LONGEST_NAME - 1}}}")
STRONGEST: Final = 100
"""As strong as a list of concepts may ask for."""
Chosen = Mapping[str, float]
"""How strong each ticked concept is to be, by what prompts call it; 1 is as tuned."""
WORDS: Final = ((0.75, "most"), (0.4, "about half"), (0.0, "little"))
"""By the share of a concept's change, in norm, that is left after fusing."""


@cache
def fusion_fields() -> list[Field]:
    """The form of fusing."""
    return fields_of(FusionSettings.model_json_schema())


def strengths_of(value: Any) -> dict[str, float]:
    """The shelf's value, which may be anybody's. Raises SettingsError."""
    if not isinstance(value, Mapping):
        raise SettingsError(f"concepts: expected how strong each ticked one is, found {shown(value)}")
    for word, strength in value.items():
        if not isinstance(strength, int | float) or not 0 <= strength <= STRONGEST:
            raise SettingsError(
                f"{shown(word)}: expected how strong it is, from 0 to {STRONGEST}, found {shown(strength)}"
            )
    return {str(word): float(strength) for word, strength in value.items()}


def chosen(workspace: Workspace, strengths: Chosen) -> list[Card]:
    """The cards that were ticked. Raises SettingsError without any."""
    found = [card for card in cards(workspace) if card.word in strengths]
    if not found:
        raise SettingsError("tick the concepts that are to be in the model")
    return found


def sources(workspace: Workspace, strengths: Chosen) -> tuple[list[Path], str]:
    """What `mixofshow fuse` is given: the concepts' files, or a list with their strengths, and what is in that.

    Raises SettingsError.
    """
    found = chosen(workspace, strengths)
    if all(strengths[card.word] == 1 for card in found):
        return [card.path for card in found], ""
    entries = []
    for card in found:
        path = Path(os.path.relpath(card.path, workspace.inputs)).as_posix()
        alphas = dict.fromkeys(("unet_alpha", "text_encoder_alpha"), strengths[card.word])
        entries.append({"lora_path": path, **alphas})
    text = json.dumps(entries, indent=1) + "\n"
    return [workspace.inputs / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"], text


def cost(settings: FusionSettings, count: int) -> str:
    """What fusing will cost, in words."""
    concepts = many(count, "concept")
    if not looks_at_inputs(settings):
        return f"{concepts} by {settings.method}: nothing is drawn or recorded; it takes little longer than reading the files."
    pictures = len(settings.picture_prompts) * count
    drawn = f"draws {pictures} pictures of {settings.steps} steps to see what the layers do"
    return f"{concepts}: {drawn}, then solves each layer once."


def command(workspace: Workspace, files: Sequence[Path], name: str, given: Mapping[str, Any]) -> str:
    """The command line that makes the same model."""
    model = workspace.models / name
    words = ["fuse", *map(workspace.shown, files), "--base", workspace.base, "--out", workspace.shown(model)]
    return line(workspace, *words, "--report", workspace.shown(report_of(model)), *options(given))


def report_of(model: Path) -> Path:
    """Where the report of a fused model lies."""
    return model.with_name(f"{model.name}.html")


def start_fusing(studio: Studio, strengths: Chosen, name: str, given: Mapping[str, Any]) -> Job:
    """A job that fuses the ticked concepts into the model of that name. Raises SettingsError, BadInputError."""
    workspace = studio.workspace
    if not NAME.fullmatch(name):
        raise SettingsError(f"name of the model: expected up to 40 letters, digits, '-', '_', found '{shown(name)}'")
    FusionSettings.of(given, "options")
    files, listed = sources(workspace, strengths)
    model = workspace.models / name
    check_outputs(files={"HTML": [report_of(model)]}, folders=[model], inputs=files)
    if listed and not files[0].exists():
        write_text(files[0], listed)

    def work(job: Job) -> list[Path]:
        studio.engine.forget()
        fused = fused_into(workspace, model, files, given, job)
        write_fusion_report(report_of(model), fused)
        job.facts = (name, kept(fused))
        job.said += [f"<{one}> {verdict.why}" for one, verdict in fused.verdicts.items()]
        return [model, report_of(model)]

    return studio.jobs.submit(KIND, f"fusing {many(len(strengths), 'concept')} into '{name}'", work)


def fused_into(workspace: Workspace, model: Path, files: Sequence[Path], given: Mapping[str, Any], job: Job) -> Fused:
    """Fuse concept files, or a list of them, into a folder."""
    task = make_job(files, given, base=workspace.base, **workspace.loading)
    looked_at = [f"<{one.info.name}>" for one in sorted(task.concepts, key=lambda one: one.hash)]  # as `fuse` has them
    looked_at += ["the base"] if task.settings.prior else []

    def progress(step: int, total: int, info: Mapping[str, float]) -> None:
        whose = looked_at[step % len(looked_at)]
        job.now = "learning what was lost" if info else f"looking at {whose}" if step < total else "solving"
        job.progress(step, total, info)

    job.now = f"looking at {looked_at[0]}" if looks_at_inputs(task.settings) else ""
    fused = fuse(task.concepts, task.pipeline, task.settings, progress=progress)
    job.go_on()
    fused.model.save(model)
    return fused


def kept(fused: Fused) -> dict[str, float]:
    """By concept, how much of its change is left over all layers, 0 to 1; none where nothing was recorded."""
    if not fused.recorded:
        return {}
    names = [concept.info.name for concept in fused.model.concepts]
    sums = {name: total(fused.layers.values(), name) for name in names}
    return {name: max(0.0, 1 - share(one.residual_sq, one.target_sq)) for name, one in sums.items()}


def bars(shares: Mapping[str, float]) -> str:
    """How much is kept of each concept, in words and as bars, as HTML."""
    rows = "".join(
        f"<tr><th scope='row'>{escape(f'<{name}>')}</th><td><meter min='0' max='1' value='{value:.3f}'>{value:.0%}</meter>"
        f" {value:.0%}</td><td>{in_words(value)}</td></tr>"
        for name, value in shares.items()
    )
    return f"<table class='kept'><caption>What fusing kept</caption>{rows}</table>" if rows else ""


def in_words(value: float) -> str:
    """A share in words."""
    return f"{next(said for least, said in WORDS if value >= least)} of what it changes is kept"
