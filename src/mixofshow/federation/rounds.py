"""A round at the center: who is there, what they bring, the fused model, and who wants or judges it.

Each step can be done again: what has arrived is kept by its content, so that a round which was broken off asks only for
what it lacks. A client that is slow, gone, or sends what does not pass the door is named in the report, and the others
lose nothing by it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from flwr.app import Message, RecordDict

from mixofshow.bases.loading import fingerprint, load_base
from mixofshow.errors import BadInputError, MixOfShowError, shown
from mixofshow.federation import messages
from mixofshow.federation.apps import APPS_LOG
from mixofshow.federation.center import CenterState
from mixofshow.federation.exchange import Exchange
from mixofshow.federation.membership import Membership
from mixofshow.federation.messages import content_of, file_of, values_of
from mixofshow.federation.outcome import Report
from mixofshow.federation.plan import Plan
from mixofshow.outputs import writing

logger = logging.getLogger(__name__)
HELLO: Final = {"name": str, "class_word": str, "version": str, "judges": bool, "wants_model": bool}
LOOKS_EVERY: Final = 1.0
MODEL: Final = "fused"
DELTA: Final = "fused.safetensors"


@dataclass
class Round:
    """A round under way, of the center in `folder`, whose plan and outcome are in `place`."""

    grid: Any
    folder: Path
    place: Path
    plan: Plan
    state: CenterState
    context: Any = None
    report: Report = field(default_factory=Report)
    names: dict[int, str] = field(default_factory=dict)

    def run(self) -> None:
        """All steps; the report is written whatever comes of them."""
        try:
            self._timed("meeting", self._meet)
            if self.plan.secure:
                self._timed("sums", self._fuse_sums)
            else:
                self._timed("concepts", self._collect)
                if self.plan.moments:
                    self._timed("moments", self._collect_moments)
                self._timed("fusing", self._fuse)
            self._timed("model", self._hand_out)
            if self.plan.judge:
                self._timed("judging", self._judge)
        except MixOfShowError as error:
            self.report.why_not = str(error)
        except Exception:
            self.report.why_not = f"the center's own fault; its {APPS_LOG} says more"
            logger.exception("a round failed")
            raise
        finally:
            self.report.save(self.place)

    def _timed(self, step: str, run: Callable[[], None]) -> None:
        started = time.monotonic()
        run()
        self.report.seconds[step] = round(time.monotonic() - started, 2)

    @cached_property
    def pipeline(self) -> Any:
        """The base."""
        return load_base(self.state.base, device=self.state.device)

    @cached_property
    def fingerprint(self) -> str:
        """The base's."""
        return fingerprint(self.pipeline)

    @cached_property
    def membership(self) -> Membership:
        """Whose concepts there are."""
        return Membership(self.folder, self.pipeline)

    def _meet(self) -> None:
        """Wait for those who are expected, and ask who is there."""
        until = time.monotonic() + self.plan.wait
        expected = set(self.plan.expect)
        while time.monotonic() < until:
            self.names = {node.node_id: node.name for node in self.grid.get_nodes()}
            if self.names and expected <= set(self.names.values()):
                break
            time.sleep(LOOKS_EVERY)
        for name in sorted(expected - set(self.names.values())):
            self.report.refused[name] = "did not come"
        self.ask(messages.HELLO, dict.fromkeys(self.names, content_of({})), self._greet)

    def _greet(self, name: str, reply: Message) -> None:
        self.report.answered[name] = {key: shown(v) if isinstance(v, str) else v for key, v in values_of(reply, HELLO).items()}

    def _collect(self) -> None:
        """Concepts, of those who have others than are here."""
        if self.plan.remove:
            self.membership.remove(self.plan.remove)
        table = self.membership.table()
        there = {name: table[name].hash for name in table if self.membership.has(table[name].hash)}
        asks = {
            node: content_of({"fingerprint": self.fingerprint, "tune": json.dumps(self.plan.tune), "has": there.get(name, "")})
            for node, name in self.names.items()
            if self._takes_part(name)
        }
        self.ask(messages.CONCEPT, asks, self._take_concept)

    def _take_concept(self, name: str, reply: Message) -> None:
        content = values_of(reply, {"hash": str})["hash"]
        table = self.membership.table()
        if name not in table or table[name].hash != content or not self.membership.has(content):
            data = file_of(reply, "concept", messages.MAX_CONCEPT)
            self.report.received[name] = len(data)
            self.membership.take(name, data)

    def _collect_moments(self) -> None:
        """Recordings that the clients made of their own concepts."""
        how = json.dumps(self.plan.fusion.recording())
        table = self.membership.table()
        asks = {
            node: content_of({"fingerprint": self.fingerprint, "tune": json.dumps(self.plan.tune), "record": how})
            for node, name in self.names.items()
            if self._takes_part(name) and name in table
        }
        self.ask(messages.MOMENTS, asks, self._take_moments)

    def _take_moments(self, name: str, reply: Message) -> None:
        """Keep a recording of the member's own concept where fusing looks for it."""
        from mixofshow.fusion.store import open_recording

        values_of(reply, {"hash": str})
        data = file_of(reply, "recording", messages.MAX_RECORDING)
        self.report.received[name] = self.report.received.get(name, 0) + len(data)
        store, member = self._store(), self.membership.table()[name]
        store.folder.mkdir(exist_ok=True)
        arrived = store.folder / f"from-{name}.safetensors"
        with writing(arrived) as temporary:
            temporary.write_bytes(data)
        try:
            recording = open_recording(arrived)
            key = recording.info.key
            if key.get("source") != member.hash or key.get("base") != self.fingerprint:
                raise BadInputError("sent a recording of something else than its concept on this base")
            for name_of_input in recording.info.rows:  # what is no recording in truth would end the fusing of all
                recording.statistics(name_of_input)
            arrived.replace(store.path(key, member.concept))
        finally:
            arrived.unlink(missing_ok=True)

    def _store(self) -> Any:
        from mixofshow.fusion.store import Store

        return Store(self.folder / "recordings")

    def _fuse(self) -> None:
        """All members' concepts, from their files, as if so from the start."""
        from mixofshow.fusion.stages import fuse

        table = self.membership.table()
        if len(table) < self.plan.least:
            raise BadInputError(f"{len(table)} members have brought concepts, the plan wants {self.plan.least} at least")
        self.report.members = {name: member.model_dump() for name, member in table.items()}
        files = [self.membership.path(member.hash) for member in table.values()]
        fused = fuse(files, self.pipeline, self.plan.fusion, store=self._store())
        self._save(fused.model)
        self.report.verdicts = {name: verdict.why for name, verdict in fused.verdicts.items()}

    def _fuse_sums(self) -> None:
        """The same from sums over clients, without having any one's concept."""
        from mixofshow.federation.secure_rounds import SecureStep, summary

        step = SecureStep(self)
        self._save(step.run())
        self.report.members = summary(step.words)

    def _save(self, model: Any) -> None:
        model.save(self.place / MODEL)
        model.save_delta(self.place / DELTA)
        self.report.fused, self.report.delta = str(self.place / MODEL), str(self.place / DELTA)

    def _hand_out(self) -> None:
        """The model, to those who want it."""
        wanting = [node for node, name in self.names.items() if self.report.answered.get(name, {}).get("wants_model")]
        content = content_of({}, {"model": (self.place / DELTA).read_bytes()}) if wanting else None
        self.ask(messages.MODEL, {node: content for node in wanting if content}, self._note_model)

    def _note_model(self, name: str, reply: Message) -> None:
        values_of(reply, {})
        self.report.answered[name]["has_model"] = True

    def _judge(self) -> None:
        """Figures of the model, from those who have held-out pictures."""
        asked = {"fingerprint": self.fingerprint, "tune": json.dumps(self.plan.tune)}
        judges = [node for node, name in self.names.items() if self.report.answered.get(name, {}).get("judges")]
        content = content_of(asked, {"model": (self.place / DELTA).read_bytes()}) if judges else None
        self.ask(messages.JUDGE, {node: content for node in judges if content}, self._note_figures)

    def _note_figures(self, name: str, reply: Message) -> None:
        figures = values_of(reply, dict.fromkeys(("fused", "single", "base"), float))
        if not all(abs(value) <= 1 for value in figures.values()):  # also what is no number
            raise BadInputError("sent figures that are no cosines")
        self.report.judged[name] = figures

    def _takes_part(self, name: str) -> bool:
        return name in self.report.answered and name not in self.plan.remove

    def ask(self, kind: str, asks: Mapping[int, RecordDict], take: Callable[[str, Message], None]) -> None:
        """Ask clients, and take what each answers; whoever fails is named, once, and has no part in what follows."""
        exchange = Exchange(self.grid, kind, asks, self.plan.patience, absence=self.plan.wait)
        for node, reply in exchange.answers():
            name = self.names[node]
            try:
                if isinstance(reply, str):
                    raise BadInputError(reply)
                take(name, reply)
            except MixOfShowError as error:
                self.report.refused[name] = str(error)
