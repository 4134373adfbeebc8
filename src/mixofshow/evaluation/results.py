"""From pictures to numbers: every picture is looked at once, and every number is made from those features.

The numbers of a suite are one plain table, written as JSON and CSV; docs/evaluation.md has the schema.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mixofshow.errors import shown
from mixofshow.evaluation import metrics
from mixofshow.evaluation.identities import identities, summarized
from mixofshow.evaluation.metrics import interval
from mixofshow.evaluation.requests import Arm, ImageRequest, PromptRequest, RequestPlan, WideRequest
from mixofshow.evaluation.scorers import ImageTower
from mixofshow.evaluation.suite_settings import GROUPS, MEAN, ConceptEntry, Suite
from mixofshow.outputs import write_text
from mixofshow.terminal import print_table, say

SCHEMA: Final = 1
STATES: Final = ("single", "fused", "change")
COLUMNS: Final = ("method", "measure", "over", "state", "value", "low", "high")
MAIN: Final = "image_alignment"
ALONE: Final = "interaction"
"""The category whose pictures show other things too; confusing those for the concept proves nothing."""
NEAR: Final = 0.05
"""A single model must beat the base, asked for the class word, by so much image alignment to have learned something."""
FOOTNOTE: Final = "* the base draws it already: its single model is not .05 above the base asked for the class word"

Values = Mapping[str, Tensor]
"""By concept, a number for every picture, (prompts, seeds)."""
Slices = Mapping[str, Mapping[str, Tensor]]
"""By name, what a mean is taken over: by concept, the numbers of its prompts."""


@dataclass(frozen=True)
class SuiteRun:
    """What came of a suite: numbers, pictures by what they are for, the folder they lie in, held-out ones by concept."""

    suite: Suite
    results: dict[str, Any]
    plan: RequestPlan
    pictures: Path
    references: Mapping[str, Sequence[Image.Image]]


@dataclass
class Judge:
    """Looks at every request's pictures once; knows held-out and training pictures by concept. All as (pictures, dim)."""

    tower: ImageTower
    texts: Callable[[Sequence[str]], Tensor]
    folder: Path
    references: Mapping[str, Tensor]
    training: Mapping[str, Tensor] = field(default_factory=dict)
    seen: dict[ImageRequest, Tensor] = field(default_factory=dict)

    def request(self, request: ImageRequest) -> Tensor:
        """Features of a request's pictures, (seeds, dim)."""
        if request not in self.seen:
            self.seen[request] = self.tower(request.pictures(self.folder))
        return self.seen[request]

    def row(self, row: Sequence[PromptRequest]) -> Tensor:
        """Features of all pictures of a concept, (prompts, seeds, dim)."""
        return torch.stack([self.request(asked.request) for asked in row])

    def crops(self, one: WideRequest) -> Tensor:
        """Features of each region of wide pictures, (seeds, regions, dim)."""
        parts = [picture.crop(box) for picture in one.pictures(self.folder) for box in one.boxes]
        return rearrange(self.tower(parts), "(seeds regions) dim -> seeds regions dim", regions=len(one.boxes))

    def alignment(self, arm: Arm, *, first: bool = False) -> Values:
        """Cosines with all references of the concept, or with the first only, as the paper's published script has it."""
        return {
            name: metrics.reference_scores(self.row(row), self.references[name][: 1 if first else None])
            for name, row in arm.items()
        }

    def text_alignment(self, arm: Arm) -> Values:
        """CLIPScores with the prompts in which the concept is called by its class word."""
        plain = {name: self.texts([asked.plain for asked in row])[:, None] for name, row in arm.items()}
        return {name: metrics.text_scores(self.row(row), plain[name]) for name, row in arm.items()}


Judges = Mapping[str, Judge]
"""By the measure that they give. That of "image_alignment" also gives all that only one gives, text alignment too."""


def values_of(judges: Judges, arm: Arm) -> dict[str, Values]:
    """Every picture's numbers, by measure."""
    clip = judges[MAIN]
    found = {MAIN: clip.alignment(arm), f"{MAIN}_first": clip.alignment(arm, first=True)}
    found["text_alignment"] = clip.text_alignment(arm)
    return found | {measure: judge.alignment(arm) for measure, judge in judges.items() if measure != MAIN}


def slices(concepts: Sequence[ConceptEntry], arm: Arm) -> Slices:
    """The mean over everything, over each kind of concept, and over each category of prompts."""
    every = {name: torch.arange(len(row)) for name, row in arm.items()}
    found: dict[str, dict[str, Tensor]] = {MEAN: every}
    for kind, group in GROUPS.items():
        found[group] = {one.name: every[one.name] for one in concepts if one.kind == kind}
    for category in dict.fromkeys(asked.category for row in arm.values() for asked in row):
        rows = {name: [k for k, one in enumerate(row) if one.category == category] for name, row in arm.items()}
        found[category] = {name: torch.tensor(numbers) for name, numbers in rows.items() if numbers}
    return {name: chosen for name, chosen in found.items() if chosen}


def per_seed(values: Values, chosen: Mapping[str, Tensor]) -> Tensor:
    """The mean over a slice for each seed, (seeds,): over a concept's prompts, then over concepts."""
    return torch.stack([values[name][rows].double().mean(0) for name, rows in chosen.items()]).mean(0)


def alignments(single: Values, fused: Values, over: Slices) -> dict[str, dict[str, Any]]:
    """For every slice the mean single, fused, and the change, each with its interval.

    Single and fused pictures have the same seeds, so the change's interval is of the differences.
    """
    found = {}
    for name, chosen in over.items():
        before, after = per_seed(single, chosen), per_seed(fused, chosen)
        rows = dict(zip(STATES, (before, after, after - before), strict=True))
        found[name] = {
            **{state: float(values.mean()) for state, values in rows.items()},
            "intervals": {state: list(interval(values)) for state, values in rows.items()},
        }
    return found


def region_hits(together: Iterable[WideRequest], judge: Judge) -> dict[str, Tensor]:
    """By concept, whether each of its regions is nearest to it of all fused concepts: 0 or 1, (pictures × seeds…,)."""
    names, hits = list(judge.references), dict[str, list[Tensor]]()
    for one in together:
        judged = metrics.nearest_concept(judge.crops(one), list(judge.references.values()))
        for place, name in enumerate(one.names):
            hits.setdefault(name, []).append((judged[:, place] == names.index(name)).double())
    return {name: torch.stack(rows) for name, rows in hits.items()}


def identity(together: Iterable[WideRequest], judge: Judge) -> dict[str, Any]:
    """Who stands in pictures of several concepts, whichever region each is in; see identities.py."""
    names, references = list(judge.references), list(judge.references.values())
    return summarized(
        [
            [identities(places, references, [names.index(name) for name in one.names]) for places in judge.crops(one)]
            for one in together
        ],
        names,
    )


def confusions(arm: Arm, judge: Judge) -> Tensor:
    """Asked for i, judged as j; pictures with other things in them are left out. (concepts, concepts)."""
    names = list(judge.references)
    asked, judged = [], []
    for name, row in arm.items():
        alone = [one for one in row if one.category != ALONE] or row
        found = metrics.nearest_concept(judge.row(alone).flatten(0, 1), list(judge.references.values()))
        asked.append(torch.full_like(found, names.index(name)))
        judged.append(found)
    return metrics.interference(torch.cat(asked), torch.cat(judged), len(names))


def results_of(suite: Suite, plan: RequestPlan, judges: Judges) -> dict[str, Any]:
    """All numbers of a suite whose pictures are drawn; what they cost is not in it."""
    over = slices(suite.concepts, plan.bounds)
    results = {
        "schema": SCHEMA,
        "concepts": len(suite.concepts),
        "names": {one.name: one.kind for one in suite.concepts},
        "methods": {method.key: _method(plan, method.key, judges, over) for method in suite.methods},
        "region_accuracy": {
            key: _region_accuracy(region_hits(row, judges[MAIN])) for key, row in plan.together.items() if row
        },
        "identity": {key: identity(row, judges[MAIN]) for key, row in plan.together.items() if row},
        "bounds": _bounds(plan, judges, over),
        "suite": suite.model_dump(mode="json"),
    }
    return {**results, "drawn_by_the_base": drawn_by_the_base(results)}


def _method(plan: RequestPlan, key: str, judges: Judges, over: Slices) -> dict[str, Any]:
    judge, alone = judges[MAIN], _alone(over)
    single, fused = (values_of(judges, arms[key]) for arms in (plan.single, plan.fused))
    found: dict[str, Any] = {measure: alignments(single[measure], fused[measure], over) for measure in single}
    found["by_concept"] = {measure: alignments(single[measure], fused[measure], alone) for measure in single}
    if key in plan.words_only:
        words = values_of(judges, plan.words_only[key])
        found["words_only"] = {measure: _means(words[measure], {**over, **alone}) for measure in words}
    arms = {"single": plan.single[key], "fused": plan.fused[key]}
    before, after = plan.base_without, plan.fused_without[key]
    return found | {
        "interference": {"names": list(judge.references), "matrix": confusions(plan.fused[key], judge).tolist()},
        "diversity": {state: _diversity(arm, judge) for state, arm in arms.items()},
        "distance_to_training": {state: _distance_to_training(arm, judge) for state, arm in arms.items()},
        "prior_drift": metrics.drift(*(torch.cat([judge.request(one) for one in row]) for row in (before, after)))
        if before
        else None,
    }


def _alone(over: Slices) -> Slices:
    return {name: {name: rows} for name, rows in over[MEAN].items()}


def _means(values: Values, over: Slices) -> dict[str, float]:
    return {name: float(per_seed(values, chosen).mean()) for name, chosen in over.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _diversity(arm: Arm, judge: Judge) -> float | None:
    return _mean(metrics.diversity(judge.row(row)) for row in arm.values())


def _distance_to_training(arm: Arm, judge: Judge) -> float | None:
    rows = {name: judge.row(arm[name]).flatten(0, 1) for name in judge.training}
    return _mean(metrics.distance_to_nearest(made, judge.training[name]) for name, made in rows.items())


def _region_accuracy(hits: Mapping[str, Tensor]) -> dict[str, Any]:
    """Over all regions, and by concept; the interval is over seeds."""
    every = torch.cat(list(hits.values()))
    return {
        "value": float(every.mean()),
        "interval": list(interval(every.mean(0))),
        "by_concept": {name: float(row.mean()) for name, row in hits.items()},
        "regions": every.numel(),
    }


def _bounds(plan: RequestPlan, judges: Judges, over: Slices) -> dict[str, Any]:
    """The base asked for the class word: the least image alignment and the most text alignment to expect.

    As near as held-out pictures are to each other: the most image alignment to expect.
    """
    values, clip = values_of(judges, plan.bounds), judges[MAIN]
    own = {
        measure: {name: metrics.self_alignment(features) for name, features in judge.references.items()}
        for measure, judge in judges.items()
    }

    def bounds(over: Slices) -> dict[str, Any]:
        found = {}
        for measure, one in values.items():
            bound = "upper" if measure == "text_alignment" else "lower"
            found[measure] = {name: {bound: mean} for name, mean in _means(one, over).items()}
            for name, chosen in over.items() if measure in own else ():
                found[measure][name]["upper"] = sum(own[measure][one] for one in chosen) / len(chosen)
        return found

    held_out = (metrics.distance_to_nearest(clip.references[name], made) for name, made in clip.training.items())
    return {
        **bounds(over),
        "by_concept": bounds(_alone(over)),
        "diversity": _diversity(plan.bounds, clip),
        "distance_to_training": _mean(held_out),
    }


def drawn_by_the_base(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """By measure, the concepts that some method's single model draws hardly better than the base draws the class word."""
    methods, bounds = results["methods"].values(), results["bounds"]["by_concept"]
    return {
        measure: [
            name
            for name, bound in bounds[measure].items()
            if any(one["by_concept"][measure][name]["single"] < bound["lower"] + NEAR for one in methods)
        ]
        for measure in bounds
        if measure != "text_alignment"
    }


def measures(results: Mapping[str, Any]) -> list[str]:
    """The alignments that there are, the most important first."""
    return [name for name in next(iter(results["methods"].values())) if "_alignment" in name]


def alignment_table(results: Mapping[str, Any], measure: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each concept as the base draws its class word, and single → fused by method; below them the means.

    A * is a concept that the base draws already.
    """
    methods, bounds = results["methods"], results["bounds"]
    rows = []
    for name in (*results["names"], *(over for over in bounds[measure] if over in (MEAN, *GROUPS.values()))):
        alone = name in results["names"]
        bound = (bounds["by_concept"] if alone else bounds)[measure][name]
        entries = [(one["by_concept"] if alone else one)[measure][name] for one in methods.values()]
        title = f"<{name}>{'*' * (name in results['drawn_by_the_base'].get(measure, ()))}" if alone else name
        arrows = [f"{entry['single']:.3f} → {entry['fused']:.3f}" for entry in entries]
        rows.append([title, f"{next(iter(bound.values())):.3f}", *arrows])
    return [measure.replace("_", " "), "base, class word", *methods], rows


def identity_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: by method, who is recognized in pictures of several concepts, missing or doubled; over all and each."""
    rows = []
    for key, one in results["identity"].items():
        asked = f"{one['accuracy']:.3f}", f"{one['missing']} of {one['asked']}", str(one["doubled"])
        rows.append([key, "all", *asked])
        for name, of in one["by_concept"].items():
            rows.append([key, f"<{name}>", f"{of['accuracy']:.3f}", str(of["missing"]), str(of["doubled"])])
    return ["several in a picture", "concept", "identity accuracy", "missing", "doubled"], rows


def of_sisters(results: Mapping[str, Any]) -> list[str]:
    """A line for each concept that was made for another base than the one it is measured on."""
    taken = ((key, *one) for key, row in results["made_for"].items() for one in row.items())
    return [f"{key}: <{name}> was made for {shown(base, 160)}" for key, name, base in taken]


def print_alignments(results: Mapping[str, Any]) -> None:
    """The tables of alignments by all judges, and of identities, on the terminal."""
    for measure in measures(results):
        if measure != f"{MAIN}_first":
            print_table(*alignment_table(results, measure))
    if any(results["drawn_by_the_base"].values()):
        say(FOOTNOTE)
    if results["identity"]:
        print_table(*identity_table(results))
    say(*of_sisters(results))


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of methods that share their single concepts: means by measure and what drew, and the same of every concept."""
    methods, bounds = results["methods"], results["bounds"]
    single = next(iter(methods.values()))

    def row(measure: str, name: str, part: Any) -> dict[str, float]:
        fused = {key: part(method)[measure][name]["fused"] for key, method in methods.items()}
        lower = next(iter(part(bounds)[measure][name].values()))
        return {"lower_bound": lower, "single": part(single)[measure][name]["single"], **fused}

    rows = {
        name: {measure: row(measure, name, lambda it: it["by_concept"]) for measure in measures(results)}
        for name in results["names"]
    }
    concepts = {
        model: {name: {measure: one[measure][model] for measure in one} for name, one in rows.items()}
        for model in ("lower_bound", "single", *methods)
    }
    means = {measure: row(measure, MEAN, lambda it: it) for measure in measures(results)}
    kept = {key: results[key] for key in ("drawn_by_the_base", "made_for")}
    return {**means, "concepts": concepts, **kept}


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write results.json and results.csv."""
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(_rows(results))
    write_text(folder / "results.csv", text.getvalue())


def _rows(results: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """Every alignment, accuracy and bound in a row of COLUMNS."""
    for key, method in results["methods"].items():
        for measure in measures(results):
            for over, entry in {**method[measure], **method["by_concept"][measure]}.items():
                for state in STATES:
                    yield key, measure, over, state, entry[state], *entry["intervals"][state]
    for key, entry in results["region_accuracy"].items():
        yield key, "region_accuracy", "mean", "fused", entry["value"], *entry["interval"]
        for name, value in entry["by_concept"].items():
            yield key, "region_accuracy", name, "fused", value, "", ""
    for key, entry in results["identity"].items():
        yield key, "identity_accuracy", "mean", "fused", entry["accuracy"], *entry["interval"]
        for name, one in entry["by_concept"].items():
            yield key, "identity_accuracy", name, "fused", one["accuracy"], "", ""
    bounds = results["bounds"]
    for measure in measures(results):
        for over, entry in {**bounds[measure], **bounds["by_concept"][measure]}.items():
            for bound, value in entry.items():
                yield "base", measure, over, bound, value, "", ""
