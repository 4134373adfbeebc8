"""A center and its clients in one process."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from simulated import Answer, LocalGrid, honest

from mixofshow.concepts.changes import LowRank
from mixofshow.federation.center import CenterState
from mixofshow.federation.plan import Plan
from mixofshow.federation.rounds import Round

QUICK = {"steps": 2, "prompts": ["photo of a {}"], "picture_prompts": ["photo of a {}"]}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other at once, and Flower's messages can be made outside of its processes."""
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    for module in ("rounds", "exchange", "owner"):
        monkeypatch.setattr(f"mixofshow.federation.{module}.LOOKS_EVERY", 0.01)


@pytest.fixture(scope="session")
def files(golden_concepts: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three concepts of the tiny golden base, by name."""
    folder = tmp_path_factory.mktemp("concepts")
    cat, man = golden_concepts
    words = ("<catx1>", "<catx2>")
    info = man.info.model_copy(update={"name": "catx", "words": words})
    deltas = {name: LowRank(one.down.roll(1, -1), one.up) for name, one in man.deltas.items()}
    third = dataclasses.replace(man, info=info, embeddings=1.1 * man.embeddings, deltas=deltas)
    made = {one.info.name: folder / f"{one.info.name}.safetensors" for one in (cat, man, third)}
    for one in (cat, man, third):
        one.save(made[one.info.name])
    return made


@dataclass
class Federation:
    """A center's folder, and clients with concepts of the golden base."""

    folder: Path
    base: Any
    files: dict[str, Path]
    clients: dict[str, Answer] = field(default_factory=dict)
    grid: LocalGrid | None = None

    def join(self, name: str, /, **settings: Any) -> None:
        """One more client; without settings it offers the concept of its name."""
        settings = settings or {"name": name, "concept": self.files[name], "approve": "always"}
        self.clients[name] = honest(self.folder / f"client-{name}", **settings)

    def round(self, number: int = 1, **plan: Any) -> Any:
        """A round's report."""
        place = self.folder / "rounds" / str(number)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        nodes = dict(enumerate(self.clients, 1))
        self.grid = LocalGrid({n: self.clients[name] for n, name in nodes.items()}, nodes)
        table = {"fuse": QUICK, "wait": 5, "patience": 60, **plan}
        made = Round(self.grid, self.folder, place, Plan(**table), CenterState(base="golden"), Context(1, 0, {}, RecordDict(), {}))
        made.__dict__["pipeline"] = self.base
        made.run()
        return made.report


@pytest.fixture
def federation(
    tmp_path: Path, golden_pipeline: Any, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Federation:
    """Nobody has joined yet. Clients share the center's base."""
    monkeypatch.setattr("mixofshow.bases.loading.load_base", lambda *args, **more: golden_pipeline)
    return Federation(tmp_path, golden_pipeline, files)
