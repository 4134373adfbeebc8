"""Reports: self-contained HTML pages, made of templates, that work from a mail or a disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from mixofshow.evaluation import charts
from mixofshow.evaluation.requests import ImageRequest
from mixofshow.evaluation.results import FOOTNOTE, SuiteRun, alignment_table, identity_table, measures, of_sisters
from mixofshow.evaluation.suite_settings import GROUPS, MEAN
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


@cache
def templates() -> Environment:
    """The pages' templates; whatever is put into them is escaped."""
    loader = PackageLoader("mixofshow.evaluation")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"number": number, "enlarged": enlarged}
    return found


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write the page that a template makes of values, whole or not at all."""
    write_text(path, templates().get_template(template).render(values))


def number(value: float | None) -> str:
    """Three digits, or none."""
    return "none" if value is None else f"{value:.3f}"


def enlarged(image: Image.Image, scale: int = 1) -> str:
    """A picture as a data URI, so many times as large."""
    return embedded(image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC))


def samples(run: SuiteRun) -> dict[str, Any]:
    """What the template of samples takes: the ways of drawing by name, and the first picture of a request."""
    plan = run.plan
    states = {"single": plan.single, "fused": plan.fused}
    arms = {f"{key}, {state}": arms[key] for key in plan.single for state, arms in states.items()}

    def picture(request: ImageRequest) -> str:
        return embedded(request.pictures(run.pictures)[0])

    return {"run": run, "arms": {"base": plan.bounds, **arms}, "picture": picture}


def write_suite_report(path: Path, run: SuiteRun) -> None:
    """The paper's tables and figures with a suite's numbers and pictures, in one file."""
    bounds = run.results["bounds"]

    def identity_rows(one: Mapping[str, Any]) -> list[list[str]]:
        return [[name, *map(number, row)] for name, row in zip(one["names"], one["matrix"], strict=True)]

    write_page(
        path,
        "suite.html.j2",
        **samples(run),
        titles={measure: TITLES[measure] for measure in measures(run.results)},
        means=[over for over in (MEAN, *GROUPS.values()) if over in bounds["image_alignment"]],
        paper=PAPER,
        table_of=partial(alignment_table, run.results),
        identities=identity_table(run.results),
        identity_rows=identity_rows,
        footnote=FOOTNOTE,
        of_sisters=of_sisters(run.results),
        charts=_charts(run.results) if charts.can_draw() else None,
    )


def _charts(results: Mapping[str, Any]) -> dict[str, Any]:
    """Charts by what they show."""
    methods, bounds = results["methods"], results["bounds"]

    def points(state: str, entries: Iterable[Mapping[str, Any]]) -> list[charts.Point]:
        return [(entry[state], *entry["intervals"][state]) for entry in entries]

    def means(measure: str) -> str:
        entries = [one[measure][MEAN] for one in methods.values()]
        series = {state: points(state, entries) for state in ("single", "fused")}
        return charts.value_chart(list(methods), series, line=next(iter(bounds[measure][MEAN].values())))

    def lines(state: str, line: float | None = None) -> str:
        overs = [over for over in bounds["image_alignment"] if over != MEAN]
        entries = {key: [one["image_alignment"][over] for over in overs] for key, one in methods.items()}
        series = {key: points(state, row) for key, row in entries.items()}
        return charts.value_chart(overs, series, joined=True, line=line)

    return {
        "means": {TITLES[measure]: means(measure) for measure in ("image_alignment", "text_alignment")},
        "fused": lines("fused"),
        "change": lines("change", 0.0),
        "matrices": {key: charts.matrix_chart(**method["interference"]) for key, method in methods.items()},
        "identities": {
            key: charts.matrix_chart(one["names"], one["matrix"]) for key, one in results["identity"].items()
        },
    }
