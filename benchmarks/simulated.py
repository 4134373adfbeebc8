"""A grid that runs clients in this process: Flower's own messages, and nothing of its network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

from mixofshow.federation.client import app as client_app
from mixofshow.federation.owner import ClientSettings, save_settings

Answer = Callable[[Message], Message]


@dataclass
class LocalGrid:
    """Clients by node number: what each answers; replies are kept until they are pulled. `sent` is all that leaves them."""

    clients: dict[int, Answer]
    names: dict[int, str]
    sent: list[Message] = field(default_factory=list)
    asked: list[tuple[int, str]] = field(default_factory=list)
    replies: dict[str, Message] = field(default_factory=dict)
    activated: dict[int, str] = field(default_factory=dict)

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=n, name=self.names[n], last_activated_at=self.activated.get(n, "2026-01-01T00:00:00+00:00"))
            for n in self.clients
        ]

    def push_messages(self, messages: list[Message]) -> list[str]:
        numbers = []
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            number = f"{node}-{len(self.asked)}"
            self.asked.append((node, kind))
            message.metadata.__dict__["_message_id"] = number
            sent = copy.deepcopy(message)  # as if through a network
            if (reply := copy.deepcopy(self.clients[node](sent))) is not None:
                reply.metadata.__dict__["_reply_to_message_id"] = number
                self.sent.append(copy.deepcopy(reply))  # the center changes what it gets
                self.replies[number] = reply
            numbers.append(number)
        return numbers

    def pull_messages(self, numbers: list[str]) -> list[Message]:
        return [self.replies.pop(number) for number in numbers if number in self.replies]

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def honest(folder: Path, **settings: Any) -> Answer:
    """A client with these settings, as Flower runs it: what it raises becomes an error that is sent."""
    save_settings(folder, ClientSettings(**settings))
    context = Context(1, 1, {"folder": str(folder)}, RecordDict(), {})

    def answer(message: Message) -> Message:
        try:
            return client_app(message, context)
        except Exception as error:
            return Message(Error(2, f"{type(error)}:<{error}>"), reply_to=message)

    return answer
