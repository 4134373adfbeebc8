"""A suite's report: the paper's tables and figures with our numbers and pictures, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from mixofshow.evaluation.charts import Point, bar_chart, line_chart, matrix_chart
from mixofshow.evaluation.report import Page
from mixofshow.evaluation.suite.plan import Arm, Plan
from mixofshow.evaluation.suite.results import measures
from mixofshow.evaluation.suite.settings import GROUPS, MEAN, Suite
from mixofshow.grids import grid

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
"""Side of a small picture in a grid, in pixels."""
WIDE_HEIGHT: Final = 128
Images = Mapping[str, Mapping[str, Sequence[Image.Image]]]


def suite_page(suite: Suite, results: Mapping[str, Any], plan: Plan, pictures: Path, images: Images) -> Page:
    """Everything; `images` are the "reference" and "train" pictures by concept, `pictures` the folder of drawn ones."""
    page = Page(f"{len(suite.concepts)} concepts in one model, {len(suite.methods)} methods")
    _tables(page, results)
    _charts(page, results)
    _by_concept(page, results)
    _samples(page, suite, plan, pictures, images)
    _words_only(page, suite, results, plan, pictures)
    _together(page, plan, results, pictures)
    _interference(page, results)
    _others(page, results)
    page.heading("How it was made")
    page.table(("what", "value"), [(key, str(value)) for key, value in results["machine"].items()])
    page.paragraph(
        f"{suite.images_per_prompt} pictures of each prompt, seeds {suite.seed} to "
        f"{suite.seed + suite.images_per_prompt - 1}, {suite.steps} steps, on base {suite.base}. Intervals are of 95 % "
        "by bootstrap over seeds."
    )
    return page


def _tables(page: Page, results: Mapping[str, Any]) -> None:
    methods = results["methods"]
    overs = [over for over in (MEAN, *GROUPS.values()) if over in next(iter(methods.values()))["image_alignment"]]
    for measure in measures(next(iter(methods.values()))):
        page.heading(TITLES[measure])
        page.paragraph("Single concept → all concepts fused, and the change with its interval.")
        ours = measure == "image_alignment"
        head = ("method", *overs, "mean change", *(("the paper's mean",) if ours else ()))
        rows = []
        for key, method in methods.items():
            row = [key, *(_arrow(method[measure][over]) for over in overs), _change(method[measure][MEAN])]
            rows.append([*row, _paper(key)] if ours else row)
        page.table(head, rows)
        if bounds := results["bounds"].get(measure):
            head = ("the base, asked for the class word", *overs)
            page.table(head, [[bound, *(f"{bounds[over][bound]:.3f}" for over in overs)] for bound in bounds[MEAN]])


def _arrow(entry: Mapping[str, Any]) -> str:
    return _from_to(entry["single"], entry["fused"])


def _from_to(first: float | None, second: float | None) -> str:
    return f"{_number(first)}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{_number(second)}"


def _change(entry: Mapping[str, Any]) -> str:
    low, high = entry["intervals"]["change"]
    return f"{entry['change']:+.3f} ({low:+.3f} to {high:+.3f})"


def _paper(key: str) -> str:
    return _from_to(*PAPER[key]) if key in PAPER else ""


def _charts(page: Page, results: Mapping[str, Any]) -> None:
    methods = results["methods"]
    page.heading("Single and fused")
    for measure in ("image_alignment", "text_alignment"):
        bounds = results["bounds"][measure][MEAN]
        line = bounds.get("lower", bounds["upper"])
        series = {
            state: [_point(one[measure][MEAN], state) for one in methods.values()] for state in ("single", "fused")
        }
        page.chart(
            bar_chart(list(methods), series, line=line),
            f"{TITLES[measure]}; dashed: the base, asked for the class word. The axis does not begin at 0.",
        )
    overs = [over for over in next(iter(methods.values()))["image_alignment"] if over != MEAN]
    lines = {key: [_point(one["image_alignment"][over], "fused") for over in overs] for key, one in methods.items()}
    page.chart(line_chart(overs, lines), "Image alignment of the fused models, by kind of concept and of prompt.")
    changes = {key: [_point(one["image_alignment"][over], "change") for over in overs] for key, one in methods.items()}
    page.chart(line_chart(overs, changes, line=0.0), "What fusion costs of it.")


def _point(entry: Mapping[str, Any], state: str) -> Point:
    return Point(entry[state], *entry["intervals"][state])


def _by_concept(page: Page, results: Mapping[str, Any]) -> None:
    methods = results["methods"]
    page.heading("Every concept")
    page.paragraph("Image alignment, single → fused, beside that of the base asked for the class word.")
    lower = results["bounds"]["by_concept"]["image_alignment"]
    page.table(
        ("concept", "kind", "base", *methods),
        [
            (
                f"<{name}>",
                kind,
                f"{lower[name]['lower']:.3f}",
                *(_arrow(one["by_concept"]["image_alignment"][name]) for one in methods.values()),
            )
            for name, kind in results["names"].items()
        ],
    )


def _samples(page: Page, suite: Suite, plan: Plan, pictures: Path, images: Images) -> None:
    page.heading("Samples")
    page.paragraph(
        "The first picture of each concept's first prompt, as in the paper's Figure 7: one seed, all models."
    )
    columns = ["reference", "base", *(f"{key}, {state}" for key in plan.single for state in ("single", "fused"))]
    cells = []
    for name, references in images["reference"].items():
        arms = [plan.bounds, *(arm for key in plan.single for arm in (plan.single[key], plan.fused[key]))]
        cells += [_small(references[0]), *(_small(_first(arm, name, pictures)) for arm in arms)]
    names = [concept.noun for concept in suite.concepts]
    page.figure(grid(cells, len(columns), row_labels=names, column_labels=columns), "single and fused", scale=1)


def _first(arm: Arm, name: str, pictures: Path, number: int = 0) -> Image.Image:
    return arm[name][number].request.pictures(pictures)[0]


def _small(image: Image.Image, height: int = THUMBNAIL) -> Image.Image:
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.BICUBIC)


def _words_only(page: Page, suite: Suite, results: Mapping[str, Any], plan: Plan, pictures: Path) -> None:
    if not plan.words_only:
        return
    page.heading("Embeddings alone, and with the change of weights")
    page.paragraph(
        "As in the paper's Figure 3: what the concept's words hold by themselves (alpha 0), and what it takes the "
        "change of weights to hold (alpha 1)."
    )
    rows = []
    for name in (MEAN, *results["names"]):
        row = [name if name == MEAN else f"<{name}>"]
        for key in plan.words_only:
            method = results["methods"][key]
            full = method["image_alignment"].get(name) or method["by_concept"]["image_alignment"][name]
            words = method["words_only"]["image_alignment"][name]
            row.append(_from_to(words, full["single"]))
        rows.append(row)
    page.table(("image alignment, alpha 0 → 1", *plan.words_only), rows)
    columns = [f"{key}, alpha {alpha}" for key in plan.words_only for alpha in (0, 1)]
    cells = [
        _small(_first(arm, concept.name, pictures))
        for concept in suite.concepts
        for key in plan.words_only
        for arm in (plan.words_only[key], plan.single[key])
    ]
    names = [concept.noun for concept in suite.concepts]
    page.figure(grid(cells, len(columns), row_labels=names, column_labels=columns), "alpha 0 and 1", scale=1)


def _together(page: Page, plan: Plan, results: Mapping[str, Any], pictures: Path) -> None:
    if not results["region_accuracy"]:
        return
    page.heading("Several concepts in one picture")
    page.paragraph(
        "Region accuracy: how often a region's nearest reference, of all fused concepts', is the one it was asked for. "
        "Below it pictures as in the paper's Figure 6: the same regions, prompts and seeds for all methods."
    )
    page.table(
        ("method", "region accuracy", "interval", "regions"),
        [
            (key, f"{one['value']:.3f}", "{:.3f} to {:.3f}".format(*one["interval"]), str(one["regions"]))
            for key, one in results["region_accuracy"].items()
        ],
    )
    rows = next(iter(plan.together.values()))
    cells = [
        _small(row[number].request.pictures(pictures)[0], WIDE_HEIGHT)
        for number in range(len(rows))
        for row in plan.together.values()
    ]
    names = [", ".join(one.names) for one in rows]
    page.figure(grid(cells, len(plan.together), row_labels=names, column_labels=list(plan.together)), "wide", scale=1)


def _interference(page: Page, results: Mapping[str, Any]) -> None:
    page.heading("Interference")
    page.paragraph("Rows: the concept that a fused model was asked for; columns: the one whose reference is nearest.")
    for key, method in results["methods"].items():
        page.chart(matrix_chart(**method["interference"]), key)


def _others(page: Page, results: Mapping[str, Any]) -> None:
    page.heading("Other figures")
    page.paragraph(
        "Diversity: distance of pictures of one prompt. Distance to the nearest training picture, which is near 0 where "
        "training pictures come back; of held-out pictures it is "
        f"{_number(results['bounds']['distance_to_training'])}. Prior drift: distance of pictures without concepts "
        "before and after fusion. Seconds and megabytes of tuning one concept, and of fusing all."
    )
    rows = []
    for key, method in results["methods"].items():
        pairs = [_arrow(method[name]) for name in DISTANCES]
        cost = [_cost(results["cost"][key][verb]) for verb in ("tune", "fuse")]
        rows.append((key, *pairs, _number(method["prior_drift"]), *cost))
    page.table(("method", "diversity", "distance to training", "prior drift", "tuning", "fusing"), rows)


DISTANCES: Final = ("diversity", "distance_to_training")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _cost(cost: Mapping[str, float | None] | None) -> str:
    if cost is None:
        return "was there"
    memory = "" if cost["peak_memory_mb"] is None else f", {cost['peak_memory_mb']:.0f} MB"
    return f"{cost['seconds']} s{memory}"
