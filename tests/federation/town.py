"""A center and its clients as processes of their own, in one folder: starting, killing and looking at them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mixofshow.federation import door
from mixofshow.federation.join import IN
from mixofshow.federation.launch import free_port
from mixofshow.federation.owner import open_questions

ALL = ["clown", "robot", "steamtrain"]
RECORDED = {"steps": 2, "prompts": ["photo of a {}"], "picture_prompts": ["photo of a {}"]}
FUSED = {**RECORDED, "guard": False}
TUNED = {"steps": 12, "batch_size": 1, "save_every": 1, "unet": {"targets": "keys-and-values"}}
APP = "multiprocessing.forkserver"
PATIENCE = 600.0
"""Seconds for what takes some ten on an idle machine."""
QUICK = """\
import sys

if "join" in sys.argv:
    from mixofshow.federation import join

    join.AGAIN_AFTER = 8.0
if "flower-supernode" in sys.argv:
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection

    heartbeat.HEARTBEAT_DEFAULT_INTERVAL = fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = 10
if any("forkserver" in word for word in sys.orig_argv):
    from flwr.supercore import constant

    constant.PULL_MAX_TRIES_PER_OBJECT = 5
"""
OF_ALICE = """\
import platform
import socket

socket.gethostname = platform.node = lambda: "machine-of-alice"
"""
LYING = """\
from pathlib import Path

if sys.argv == ["-c"]:
    from mixofshow.federation import client

    honest, sent = client.content_of, Path(__file__).with_name("sent")
    client.content_of = lambda values, files=None: honest(values, files and {"concept": sent.read_bytes()})
"""
OLD = """\
if sys.argv == ["-c"]:
    from mixofshow.federation import messages

    messages.PROTOCOL = 0
"""
"""Python runs these before a client's programs: shorter waits than Flower's (the least that it takes) and ours, for all;
another machine's name; other bytes than the file's, or another version, in what apps are forked from."""


def until(done, what):
    """Wait for something to come true."""
    end = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


@dataclass
class Town:
    """The center's folder and its clients', and the processes of each."""

    place: Path
    port: int
    offers: dict[str, list[object]] = field(default_factory=dict)
    running: dict[str, subprocess.Popen] = field(default_factory=dict)
    sent: list[bytes] = field(default_factory=list)
    ways: dict[str, int] = field(default_factory=dict)
    habits: dict[str, Path] = field(default_factory=dict)

    @property
    def center(self) -> Path:
        return self.place / "center"

    def start(self, name, *words):
        with (self.place / f"{name}.out").open("ab") as out:
            command = [sys.executable, "-m", "mixofshow", *map(str, words)]
            if before := self.running.get(name):
                before.stdin.close()
            habits = self.habits.get(name) or self.has_habit(name, "")
            env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(habits), os.environ.get("PYTHONPATH", "")])}
            env["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "0.2"
            self.running[name] = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=out, stderr=out)
        return self.running[name]

    def start_center(self):
        (self.center / "center.json").unlink(missing_ok=True)
        self.start("center", "center", "--folder", self.center, "--host", "127.0.0.1", "--port", self.port)
        until((self.center / "center.json").exists, "the center")

    def has_habit(self, name, source):
        """Python runs this before all programs of the client's. What it sends in place of a file stands beside it."""
        self.habits[name] = self.place / f"habits-of-{name}"
        self.habits[name].mkdir()
        (self.habits[name] / "sitecustomize.py").write_text(QUICK + source)
        return self.habits[name]

    def join(self, name):
        ca = self.center / "tls" / "ca.pem"
        words = ("--ca", ca, "--name", name, "--folder", self.place / name, *self.offers[name])
        self.start(name, "join", f"127.0.0.1:{self.ways.get(name, self.port)}", *words)

    def let_in(self, name):
        """How often the center has let a client in."""
        log = self.place / name / "supernode.log"
        return log.read_text(errors="replace").count(IN) if log.exists() else 0

    def said(self, name):
        return (self.place / f"{name}.out").read_text(errors="replace")

    def why(self):
        """What the logs end with, where a test fails."""
        logs = [*self.place.glob("*.out"), *self.place.glob("*/super*.log")]
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def kill(self, name):
        self.running[name].send_signal(signal.SIGKILL)
        process = self.running.pop(name)
        process.wait()
        process.stdin.close()

    def kill_program(self, command, folder):
        """A program of Flower's that works for a center's or client's folder, or its apps."""
        for pid in apps(folder) if command == APP else processes(command, folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_node(self, name):
        """A client's SuperNode alone."""
        self.kill_program("flower-supernode", self.place / name)

    def restart(self, name):
        self.kill(name)
        self.start_center() if name == "center" else self.join(name)

    def federate(self, **plan):
        table = {
            "wait": PATIENCE,
            "patience": PATIENCE,
            "fuse": FUSED,
            "tune": TUNED,
            "expect": ALL,
            "least": 3,
            **plan,
        }
        (self.place / "plan.yaml").write_text(json.dumps(table))
        return self.start("federate", "federate", self.place / "plan.yaml", "--folder", self.center)

    def ended(self, round_):
        """The report of a round that went well."""
        assert round_.wait(2 * PATIENCE) == 0, self.why()
        newest = sorted((self.center / "rounds").iterdir())[-1] / "report.json"
        return json.loads(newest.read_text())

    def question(self):
        """What the clown's owner is asked, by hash."""
        (content,) = until(lambda: open_questions(self.place / "clown"), "the owner's question")
        return content

    def arrived(self):
        table = self.center / "members.json"
        return sorted(json.loads(table.read_text())) if table.exists() else []

    def checkpoints(self):
        return sorted((self.place / "steamtrain" / "tuned").glob("*/checkpoints/step-*.pt"))

    def heard(self, name, kind):
        """How often a client was asked for this."""
        log = self.place / name / "supernode.log"
        return log.read_text(errors="replace").count(f"Receiving: {kind}") if log.exists() else 0

    def forget(self):
        """Nothing has arrived, been asked or tuned yet."""
        for one in (*self.center.glob("concepts/*"), *(self.place / "clown").glob("*/*"), self.center / "members.json"):
            if one.is_file() and "flower" not in one.parts:
                one.unlink(missing_ok=True)
        for one in (*self.checkpoints(), *(self.place / "steamtrain" / "tuned").glob("*.safetensors")):
            one.unlink()


def processes(command, folder):
    """Numbers of processes of Flower's with this home whose command line holds a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            home = f"FLWR_HOME={folder / 'flower'}".encode()
            if (
                home in (path / "environ").read_bytes().split(b"\0")
                and command.encode() in (path / "cmdline").read_bytes()
            ):
                found.append(int(path.name))
    return found


def apps(folder):
    """Numbers of the processes of apps: forks, which have the command line of what they were forked from."""
    forks = processes(APP, folder)
    return [pid for pid in forks if int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) in forks]


@contextlib.contextmanager
def overheard(center: Path, port: int, heard: list[bytes]) -> Iterator[int]:
    """A door before the center's, at the port that is yielded, which keeps the headers and body of all that is sent."""
    honest = door.make_door

    def make_door(*given):
        app = honest(*given)

        async def listen(scope, receive, send):
            body = bytearray()

            async def hear():
                event = await receive()
                body.extend(event.get("body", b""))
                return event

            await app(scope, hear if scope["type"] == "http" else receive, send)
            heard.append(b"\n".join([*(b": ".join(pair) for pair in scope.get("headers", ())), bytes(body)]))

        return listen

    own = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "make_door", make_door)
        with door.open_door(center, "127.0.0.1", own, f"127.0.0.1:{port}"):
            yield own
