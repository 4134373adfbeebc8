"""Reports: self-contained HTML pages, made of templates, that work from a mail or a disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from mixofshow.evaluation import charts
from mixofshow.evaluation.requests import Arm, RequestPlan
from mixofshow.evaluation.results import SuiteRun, alignment_table, measures
from mixofshow.evaluation.suite_settings import GROUPS, MEAN
from mixofshow.grids import grid
from mixofshow.outputs import write_text
from mixofshow.sampling.pictures import embedded

PAPER: Final[Mapping[str, tuple[float, float]]] = {
    "lora+average": (0.816, 0.701),
    "ed-lora+average": (0.843, 0.749),
    "ed-lora+gradient": (0.843, 0.818),
}
"""Image alignment, single and fused, of the paper's 14 concepts on Stable Diffusion 1.5 by CLIP ViT-B/32 (its §4)."""
TITLES: Final = {
    "image_alignment": "Image alignment",
    "image_alignment_first": "Image alignment, with the first reference only",
    "text_alignment": "Text alignment",
    "dino_alignment": "Image alignment by DINO",
    "imagenet_alignment": "Image alignment by a network of photographs",
}
THUMBNAIL: Final = 96
WIDE_HEIGHT: Final = 128
"""Heights of small pictures in a grid, in pixels."""


@cache
def _templates() -> Environment:
    loader = PackageLoader("mixofshow.evaluation")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"enlarged": enlarged, "number": number, "arrow": arrow, "change": _change, "cost": _cost}
    return found


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write the page that a template makes of values, whole or not at all."""
    write_text(path, _templates().get_template(template).render(values))


def enlarged(image: Image.Image, scale: int = 1) -> str:
    """A picture as a data URI, so many times as large."""
    return embedded(image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC))


def number(value: float | None) -> str:
    """Three digits, or none."""
    return "none" if value is None else f"{value:.3f}"


def arrow(entry: Mapping[str, Any] | Sequence[float | None]) -> str:
    """From single to fused, or from the first of two numbers to the second."""
    first, second = (entry["single"], entry["fused"]) if isinstance(entry, Mapping) else entry
    return f"{number(first)}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{number(second)}"


def _change(entry: Mapping[str, Any]) -> str:
    low, high = entry["intervals"]["change"]
    return f"{entry['change']:+.3f} ({low:+.3f} to {high:+.3f})"


def _cost(cost: Mapping[str, float | None] | None) -> str:
    if cost is None:
        return "was there"
    memory = "" if cost["peak_memory_mb"] is None else f", {cost['peak_memory_mb']:.0f} MB"
    return f"{cost['seconds']} s{memory}"


def write_suite_report(path: Path, run: SuiteRun) -> None:
    """The paper's tables and figures with a suite's numbers and pictures, in one file."""
    results, plan = run.results, run.plan
    overs = next(iter(results["methods"].values()))["image_alignment"]
    write_page(
        path,
        "suite.html.j2",
        suite=run.suite,
        results=results,
        titles={measure: TITLES[measure] for measure in measures(results)},
        means=[over for over in (MEAN, *GROUPS.values()) if over in overs],
        paper=PAPER,
        table_of=partial(alignment_table, results),
        charts=_charts(results["methods"], results["bounds"]) if charts.can_draw() else None,
        samples=sample_sheet(run),
        words_only=_words_only_sheet(plan, run.pictures) if plan.words_only else None,
        together=_together_sheet(plan, run.pictures) if results["region_accuracy"] else None,
    )


def _charts(methods: Mapping[str, Any], bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Charts by what they show."""

    def points(state: str, entries: Iterable[Mapping[str, Any]]) -> list[charts.Point]:
        return [(entry[state], *entry["intervals"][state]) for entry in entries]

    def bars(measure: str) -> str:
        entries = [one[measure][MEAN] for one in methods.values()]
        series = {state: points(state, entries) for state in ("single", "fused")}
        return charts.bar_chart(list(methods), series, line=next(iter(bounds[measure][MEAN].values())))

    def lines(state: str, line: float | None = None) -> str:
        overs = [over for over in bounds["image_alignment"] if over != MEAN]
        entries = {key: [one["image_alignment"][over] for over in overs] for key, one in methods.items()}
        return charts.line_chart(overs, {key: points(state, row) for key, row in entries.items()}, line=line)

    return {
        "bars": {TITLES[measure]: bars(measure) for measure in ("image_alignment", "text_alignment")},
        "fused": lines("fused"),
        "change": lines("change", 0.0),
        "matrices": {key: charts.matrix_chart(**method["interference"]) for key, method in methods.items()},
    }


def sample_sheet(run: SuiteRun, *, prompts: int = 1) -> Image.Image:
    """The first picture of each concept's first prompts by all models, beside a reference."""
    plan = run.plan
    columns = ["reference", "base", *(f"{key}, {state}" for key in plan.single for state in ("single", "fused"))]
    arms = [plan.bounds, *(arm for key in plan.single for arm in (plan.single[key], plan.fused[key]))]
    rows = [(name, k) for name in run.references for k in range(min(prompts, len(plan.bounds[name])))]
    cells: list[Image.Image] = []
    for name, k in rows:
        cells += [_small(run.references[name][0]), *(_first(arm, name, run.pictures, k) for arm in arms)]
    return grid(cells, len(columns), row_labels=[f"<{name}>" for name, _ in rows], column_labels=columns)


def _first(arm: Arm, name: str, pictures: Path, prompt: int = 0) -> Image.Image:
    return _small(arm[name][prompt].request.pictures(pictures)[0])


def _small(image: Image.Image, height: int = THUMBNAIL) -> Image.Image:
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.BICUBIC)


def _words_only_sheet(plan: RequestPlan, pictures: Path) -> Image.Image:
    arms = [arm for key in plan.words_only for arm in (plan.words_only[key], plan.single[key])]
    columns = [f"{key}, alpha {alpha}" for key in plan.words_only for alpha in (0, 1)]
    cells = [_first(arm, name, pictures) for name in plan.bounds for arm in arms]
    return grid(cells, len(columns), row_labels=[f"<{name}>" for name in plan.bounds], column_labels=columns)


def _together_sheet(plan: RequestPlan, pictures: Path) -> Image.Image:
    rows = list(zip(*plan.together.values(), strict=True))
    cells = [_small(one.pictures(pictures)[0], WIDE_HEIGHT) for row in rows for one in row]
    names = [", ".join(row[0].names) for row in rows]
    return grid(cells, len(plan.together), row_labels=names, column_labels=list(plan.together))
