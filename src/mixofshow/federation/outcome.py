"""What came of a round, for its file and for people. Imports nothing that takes seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixofshow.outputs import write_text


@dataclass
class Report:
    """What came of a round: by member, what was answered, or refused and why."""

    answered: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    members: dict[str, dict[str, str]] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    judged: dict[str, dict[str, float]] = field(default_factory=dict)
    fused: str = ""
    delta: str = ""
    why_not: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, place: Path) -> None:
        """Write it whole."""
        write_text(place / "report.json", json.dumps(vars(self), indent=1) + "\n")


def told(report: Mapping[str, Any]) -> Iterable[str]:
    """What came of a round, in lines for people."""
    for name, offer in report["answered"].items():
        size = report["received"].get(name)
        news = f"sent {size} bytes" if size else "nothing new"
        yield f"{name}: <{offer['name']}>, {news}" + (", has the model" if offer.get("has_model") else "")
    for name, why in report["refused"].items():
        yield f"{name}: refused: {why}"
    for name, why in report["verdicts"].items():
        yield f"guard: <{name}> {why}"
    for name, figures in report["judged"].items():
        yield f"{name} judged: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
    if report["fused"]:
        yield f"{report['fused']}: concepts fused: {len(report['members'])}; as a delta: {report['delta']}"
    if report["why_not"]:
        yield f"not fused: {report['why_not']}"
