"""Asking many clients at once: each answers in its time, and one that is gone holds up nobody longer than it may.

A client does one thing at a time (flwr 1.42): asked while it still tunes or waits for its owner in a round that was
broken off, it answers once that is done. So whoever is there is waited for, and only whoever is away is given up.

Flower loses a message whose SuperNode is killed after it has taken it (its state is in memory; flwr 1.42), and answers
for a node that was away for a minute. Here a client that has come back is asked again; its answers cost nothing twice.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Final

from flwr.app import Message, RecordDict

from mixofshow.errors import shown

NODE_UNAVAILABLE: Final = 5
"""Flower's code for a node whose heartbeats ceased (`ErrorCode`)."""
LOOKS_EVERY: Final = 1.0
SLOW: Final = "did not answer in time"
GONE: Final = "went away, and did not come back"


@dataclass
class Exchange:
    """Messages under way: who is asked what, and under which number.

    A node may take `patience` seconds to answer, and be away for `absence` seconds of them.
    """

    grid: Any
    kind: str
    asks: Mapping[int, RecordDict]
    patience: float
    absence: float
    pending: dict[str, int] = field(default_factory=dict)
    asked_at: dict[int, datetime.datetime] = field(default_factory=dict)

    def answers(self) -> Iterator[tuple[int, Message | str]]:
        """Each node's answer as it comes, or why there is none."""
        until = time.monotonic() + self.patience
        away: dict[int, float] = {}
        self._push(self.asks)
        while self.pending or away:
            for reply in self.grid.pull_messages(list(self.pending)) if self.pending else []:
                node = self.pending.pop(reply.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                if reply.has_error() and reply.error.code == NODE_UNAVAILABLE:
                    away[node] = time.monotonic()
                else:
                    yield node, _why(reply) if reply.has_error() else reply
            if time.monotonic() > until:
                break
            back = self._back(away.keys())
            self._push(back)
            gone = {node for node, since in away.items() if node not in back and time.monotonic() - since > self.absence}
            yield from ((node, GONE) for node in gone)
            away = {node: since for node, since in away.items() if node not in back | gone}
            time.sleep(LOOKS_EVERY)
        for node in {*self.pending.values(), *away}:
            yield node, SLOW

    def _back(self, away: Set[int]) -> set[int]:
        """Those who have come, or come again, since they were asked."""
        there = {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}
        new = {n for n in self.pending.values() if n in there and _moment(there[n]) > self.asked_at[n]}
        return new | (away & there.keys())

    def _push(self, nodes: Mapping[int, RecordDict] | set[int]) -> None:
        for node in nodes:
            self.pending = {number: other for number, other in self.pending.items() if other != node}
            self.asked_at[node] = datetime.datetime.now(datetime.UTC)
            (number,) = self.grid.push_messages([Message(self.asks[node], node, self.kind, ttl=self.patience)])
            if number is not None:
                self.pending[number] = node


def _moment(text: str) -> datetime.datetime:
    when = datetime.datetime.fromisoformat(text)
    return when if when.tzinfo else when.replace(tzinfo=datetime.UTC)


def _why(reply: Message) -> str:
    return f"failed ({shown(reply.error.reason or f'code {reply.error.code}', 200)})"
