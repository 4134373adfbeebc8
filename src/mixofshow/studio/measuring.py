"""Measuring what is on the shelf: how much of each concept's identity is left, alone and fused, and who disturbs whom."""

from __future__ import annotations

import contextlib
import html
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mixofshow.errors import DatasetError, SettingsError, shown
from mixofshow.evaluation.results import MAIN, alignment_table, drawn_by_the_base
from mixofshow.evaluation.study import PREFERENCES, build_study, score_study
from mixofshow.evaluation.suite import perform, suite_of_files
from mixofshow.outputs import check_outputs
from mixofshow.reading import read_json
from mixofshow.replaceable import kind_of
from mixofshow.studio.commands import line
from mixofshow.studio.compose import Studio
from mixofshow.studio.jobs import Job
from mixofshow.studio.shelf import Card, cards
from mixofshow.studio.tuning import copy_pictures
from mixofshow.studio.web import many
from mixofshow.studio.workspace import Workspace

KIND: Final = "measure"
RESULTS: Final = "results"
METHODS: Final = ("gradient", "average")
LARGEST_INSIDE: Final = 30_000_000
"""Bytes of a page that is shown within the studio's."""
Table = tuple[list[str], list[list[str]]]


def held_out(workspace: Workspace, card: Card) -> Path:
    """The folder of a concept's held-out pictures."""
    return workspace.folder / "measured" / (card.name if card.name != RESULTS else f"{RESULTS}.held-out")


def add_held_out(workspace: Workspace, word: str, uploads: Sequence[Path]) -> list[str]:
    """Copy pictures that no tuning has seen into the concept's folder; a line for each that cannot be read."""
    if not word:
        raise SettingsError("whose pictures? choose a concept first, then drop them")
    found = [card for card in cards(workspace) if card.word == word]
    if not found:
        raise SettingsError(f"no concept on the shelf is called '{shown(word)}'")
    return copy_pictures(held_out(workspace, found[0]), uploads)


def measurable(workspace: Workspace) -> list[Card]:
    """The concepts that have held-out pictures."""
    return [card for card in cards(workspace) if any(held_out(workspace, card).glob("*"))]


def command(workspace: Workspace, images: int) -> str:
    """The command line that measures the same."""
    pairs = [
        f"{workspace.shown(card.path)}={workspace.shown(held_out(workspace, card))}" for card in measurable(workspace)
    ]
    words = ["evaluate", *pairs, "--base", workspace.base, "--images", str(images)]
    return line(workspace, *words, "--out", workspace.shown(report_folder(workspace)))


def report_folder(workspace: Workspace) -> Path:
    """Where the results, the report and what was drawn for them lie."""
    return workspace.folder / "measured" / RESULTS


def start_measuring(studio: Studio, images: int) -> Job:
    """A job that measures every concept with held-out pictures. Raises DatasetError, SettingsError."""
    workspace = studio.workspace
    chosen = measurable(workspace)
    if not chosen:
        raise DatasetError("no concept has held-out pictures yet; drop some that it was not tuned on")
    pairs = [f"{card.path}={held_out(workspace, card)}" for card in chosen]
    suite = suite_of_files(pairs, METHODS, base=workspace.base, images_per_prompt=images)
    loading = {key: value for key, value in workspace.loading.items() if key != "device" and value is not None}

    def work(job: Job) -> list[Path]:
        studio.engine.forget()
        out, device = report_folder(workspace), workspace.loading.get("device", "cpu")
        perform(suite, out, device=device, loading=loading, bars=lambda _: contextlib.nullcontext(job.progress))
        return [out / "results.json", out / "report.html"]

    return studio.jobs.submit(KIND, f"measuring {many(len(chosen), 'concept')}", work)


def study_page(workspace: Workspace) -> Path:
    """The page on which people answer."""
    return workspace.folder / "measured" / "study.html"


def make_study(workspace: Workspace, count: int) -> int:
    """The page with pairs of what was measured, to be chosen from, as `mixofshow study build` makes it; how many it asks.

    Raises BadInputError, SettingsError.
    """
    if not (report_folder(workspace) / "results.json").is_file():
        raise SettingsError("nothing is measured yet: press Measure first, whose pictures people are asked about")
    page = study_page(workspace)
    check_outputs(files={"HTML": [page]})
    return build_study(report_folder(workspace), [",".join(METHODS)], page, count=count, outside=True)


def study_command(workspace: Workspace, count: int) -> str:
    """The command line that makes the same page; held-out pictures lie beside the results, not in them."""
    words = ["study", "build", workspace.shown(report_folder(workspace)), "--pairs", ",".join(METHODS)]
    words += ["--out", workspace.shown(study_page(workspace)), "--count", str(count), "--outside"]
    return shlex.join(["mixofshow", *words])


def inside(page: Path, *, answering: bool = False) -> str:
    """A page of ours within the studio's, which it cannot reach; only a study runs scripts, to save the answers.

    Empty for one that is too large to be sent so.
    """
    if not page.is_file() or page.stat().st_size > LARGEST_INSIDE or kind_of(page) != "HTML":
        return ""
    may = "allow-scripts allow-downloads" if answering else ""
    text = html.escape(page.read_text("utf-8"))
    return f'<iframe class="inside" title="{page.stem}" sandbox="{may}" srcdoc="{text}"></iframe>'


def results_in(path: Path) -> dict[str, Any]:
    """A suite's results.json, of whomever. Raises BadInputError, SettingsError for another file."""
    found = read_json(path)
    if not isinstance(found, dict) or not {"methods", "bounds"} <= found.keys():
        raise SettingsError(f"{shown(path.name)}: not the results.json of a suite")
    return found


def tables(results: Mapping[str, Any]) -> tuple[Table, Table]:
    """Image alignment by concept and method; and how far each concept is taken for others, by the first method.

    Raises SettingsError for results that do not hold them.
    """
    try:
        matrix = next(iter(results["methods"].values()))["interference"]
        names = [str(name) for name in matrix["names"]]
        shares = zip(names, matrix["matrix"], strict=True)
        rows = [[f"<{name}>", *(f"{value:.2f}" for value in row)] for name, row in shares]
        whole = {"drawn_by_the_base": drawn_by_the_base(results), **results}  # which older results do not say
        return alignment_table(whole, MAIN), (["drawn \\ looks like", *(f"<{name}>" for name in names)], rows)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise SettingsError(f"these results hold no {shown(error)}") from error


def preferences(answers: Sequence[Path]) -> Table:
    """What people answered in a study, as `mixofshow study score` counts it. Raises BadInputError."""
    return list(PREFERENCES), [list(one.row) for one in score_study(answers)]
