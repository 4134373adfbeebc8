"""A suite's results as one plain table, and that as JSON and CSV. docs/evaluation.md has the schema."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.evaluation import metrics
from mixofshow.evaluation.scorers import Scorer
from mixofshow.evaluation.suite.intervals import interval
from mixofshow.evaluation.suite.measure import (
    Eye,
    Pictures,
    Slices,
    Values,
    confusions,
    image_values,
    mean_distance_to_training,
    mean_diversity,
    per_seed,
    prior_drift,
    region_hits,
    slices,
    text_values,
)
from mixofshow.evaluation.suite.plan import Arm, Plan
from mixofshow.evaluation.suite.settings import Suite
from mixofshow.outputs import write_text

SCHEMA: Final = 1
STATES: Final = ("single", "fused", "change")
COLUMNS: Final = ("method", "measure", "over", "state", "value", "low", "high")


@dataclass(frozen=True)
class Judges:
    """What looks at the pictures: the eye of the CLIP with its texts, and others by the measure that they give."""

    scorer: Scorer
    eye: Eye
    pictures: Pictures
    others: Mapping[str, tuple[Eye, Pictures]]

    def values(self, arm: Arm) -> dict[str, Values]:
        """Every picture's numbers, by measure."""
        references = self.pictures.references
        found = {
            "image_alignment": image_values(arm, self.eye, references),
            "image_alignment_first": image_values(arm, self.eye, references, first=True),
            "text_alignment": text_values(arm, self.eye, self.scorer),
        }
        return found | {
            measure: image_values(arm, eye, pictures.references) for measure, (eye, pictures) in self.others.items()
        }


def results_of(suite: Suite, plan: Plan, judges: Judges) -> dict[str, Any]:
    """All numbers of a suite whose pictures are drawn; what they cost is not in it."""
    over = slices(suite.concepts, plan.bounds)
    methods = {method.key: _method(plan, method.key, judges, over) for method in suite.methods}
    return {
        "schema": SCHEMA,
        "concepts": len(suite.concepts),
        "names": {one.name: one.kind for one in suite.concepts},
        "methods": methods,
        "region_accuracy": {
            key: _region_accuracy(region_hits(row, judges.eye, judges.pictures.references))
            for key, row in plan.together.items()
            if row
        },
        "bounds": _bounds(plan, judges, over),
        "suite": suite.model_dump(mode="json"),
    }


def _method(plan: Plan, key: str, judges: Judges, over: Slices) -> dict[str, Any]:
    single, fused = judges.values(plan.single[key]), judges.values(plan.fused[key])
    alone = {name: {name: rows} for name, rows in over["mean"].items()}
    eye, references, training = judges.eye, judges.pictures.references, judges.pictures.training
    found: dict[str, Any] = {measure: alignments(single[measure], fused[measure], over) for measure in single}
    found["by_concept"] = {measure: alignments(single[measure], fused[measure], alone) for measure in single}
    if key in plan.words_only:
        words = judges.values(plan.words_only[key])
        found["words_only"] = {measure: _means(words[measure], {**over, **alone}) for measure in words}
    return found | {
        "interference": {"names": list(references), "matrix": confusions(plan.fused[key], eye, references).tolist()},
        "diversity": {state: mean_diversity(arm[key], eye) for state, arm in _states(plan)},
        "distance_to_training": {
            state: mean_distance_to_training(arm[key], eye, training) for state, arm in _states(plan)
        },
        "prior_drift": prior_drift(plan, key, eye),
    }


def _states(plan: Plan) -> tuple[tuple[str, Mapping[str, Arm]], ...]:
    return ("single", plan.single), ("fused", plan.fused)


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


def _means(values: Values, over: Slices) -> dict[str, float]:
    return {name: float(per_seed(values, chosen).mean()) for name, chosen in over.items()}


def _region_accuracy(hits: Mapping[str, Tensor]) -> dict[str, Any]:
    """Over all regions, and by concept; the interval is over seeds."""
    every = torch.cat(list(hits.values()))
    return {
        "value": float(every.mean()),
        "interval": list(interval(every.mean(0))),
        "by_concept": {name: float(row.mean()) for name, row in hits.items()},
        "regions": every.numel(),
    }


def _bounds(plan: Plan, judges: Judges, over: Slices) -> dict[str, Any]:
    """The base asked for the class word: the least image alignment and the most text alignment to expect.

    As near as held-out pictures are to each other: the most image alignment to expect.
    """
    values, pictures = judges.values(plan.bounds), judges.pictures
    alone = {name: {name: rows} for name, rows in over["mean"].items()}

    def bounds(slices_: Slices) -> dict[str, Any]:
        lower, upper = _means(values["image_alignment"], slices_), _means(values["text_alignment"], slices_)
        own = {
            name: sum(metrics.self_alignment(pictures.references[one]) for one in chosen) / len(chosen)
            for name, chosen in slices_.items()
        }
        return {
            "image_alignment": {name: {"lower": lower[name], "upper": own[name]} for name in slices_},
            "text_alignment": {name: {"upper": upper[name]} for name in slices_},
        }

    held_out = [
        metrics.distance_to_nearest(pictures.references[name], pictures.training[name]) for name in pictures.references
    ]
    return {
        **bounds(over),
        "by_concept": bounds(alone),
        "diversity": mean_diversity(plan.bounds, judges.eye),
        "distance_to_training": sum(held_out) / len(held_out),
    }


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write results.json and results.csv."""
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(rows(results))
    write_text(folder / "results.csv", text.getvalue())


def rows(results: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """Every alignment and region accuracy in a row of COLUMNS."""
    for key, method in results["methods"].items():
        for measure in measures(method):
            for over, entry in {**method[measure], **method["by_concept"][measure]}.items():
                for state in STATES:
                    yield key, measure, over, state, entry[state], *entry["intervals"][state]
    for key, entry in results["region_accuracy"].items():
        yield key, "region_accuracy", "mean", "fused", entry["value"], *entry["interval"]
    for measure in ("image_alignment", "text_alignment"):
        for over, entry in {**results["bounds"][measure], **results["bounds"]["by_concept"][measure]}.items():
            for bound, value in entry.items():
                yield "base", measure, over, bound, value, "", ""


def suite_means(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Mean alignments by measure and then by what drew the pictures, for the terminal."""
    found: dict[str, dict[str, float]] = {}
    for measure in ("image_alignment", "text_alignment"):
        bounds = results["bounds"][measure]["mean"]
        found[measure] = {"the base, asked for the class word": bounds.get("lower", bounds["upper"])}
        for key, method in results["methods"].items():
            found[measure] |= {f"{key}, {state}": method[measure]["mean"][state] for state in ("single", "fused")}
    return found


def measures(method: Mapping[str, Any]) -> list[str]:
    """The alignments that a method has, the most important first."""
    return [name for name in method if "_alignment" in name]
