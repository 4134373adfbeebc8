"""A center and its clients as processes of their own, on the loopback, with TLS and node keys: started once.

Who is killed is started again, and the round goes on without tuning or asking twice.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from mixofshow.concepts.concept import load_concept
from mixofshow.federation.keys import admit, make_node_key
from mixofshow.federation.owner import answer, open_questions

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples" / "concepts"
NAMES = ("clown", "robot", "steamtrain")
QUICK = {"method": "average", "guard": False}
PATIENCE = 600.0
"""Seconds for what takes some ten on an idle machine."""


def until(done, what):
    """Wait for something to come true."""
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.2)


@dataclass
class Town:
    """The center's folder and its clients', and the processes of each."""

    place: Path
    port: int
    running: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def center(self) -> Path:
        return self.place / "center"

    def start(self, name, *words):
        with (self.place / f"{name}.out").open("ab") as out:
            command = [sys.executable, "-m", "mixofshow", *map(str, words)]
            if before := self.running.get(name):
                before.stdin.close()
            self.running[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out)
        return self.running[name]

    def start_center(self):
        self.start("center", "center", "--folder", self.center, "--host", "127.0.0.1", "--port", self.port)

    def join(self, name, *more, admitted=True):
        folder = self.place / name
        line = make_node_key(folder / "key")
        if admitted:
            admit(self.center, name, line)
        concept = EXAMPLES / f"{name}.safetensors"
        offer = ["--concept", concept if concept.exists() else EXAMPLES / "clown.safetensors"]
        ca = self.center / "tls" / "ca.pem"
        self.start(name, "join", f"127.0.0.1:{self.port}", "--ca", ca, "--name", name, "--folder", folder, *(more or offer))

    def said(self, name):
        return (self.place / f"{name}.out").read_text(errors="replace")

    def kill(self, name):
        self.running[name].send_signal(signal.SIGKILL)
        process = self.running.pop(name)
        process.wait()
        process.stdin.close()

    def federate(self, **plan):
        table = {"wait": PATIENCE, "patience": PATIENCE, "fuse": QUICK, **plan}
        (self.place / "plan.yaml").write_text(json.dumps(table))
        return self.start("federate", "federate", self.place / "plan.yaml", "--folder", self.center)

    def round(self, **plan):
        process = self.federate(**plan)
        process.wait(2 * PATIENCE)
        return process.returncode, self.report()

    def report(self):
        newest = sorted((self.center / "rounds").iterdir())[-1] / "report.json"
        return json.loads(newest.read_text()) if newest.exists() else None

    def log(self):
        path = self.center / "superlink.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def inner(self):
        return json.loads((self.center / "center.json").read_text())["inner"]


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Iterator[Town]:
    place = tmp_path_factory.mktemp("town")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    made = Town(place, port)
    subprocess.run([sys.executable, "-m", "mixofshow", "center", "keys", "--folder", str(made.center)], check=True)
    for name in NAMES:
        made.join(name, "--concept", EXAMPLES / f"{name}.safetensors", *(["--want-model"] if name == "robot" else []), "--approve",
                  "ask" if name == "clown" else "always")
    made.join("stranger", admitted=False)
    made.start_center()
    until((made.center / "center.json").exists, "the center")
    yield made
    for name in list(made.running):
        made.running[name].terminate()
    for name in list(made.running):
        made.running[name].wait(60)
        made.running[name].stdin.close()


def test_a_round_of_three_equals_fuse_of_their_files_and_a_stranger_is_refused(town, tmp_path):
    content = load_concept(EXAMPLES / "clown.safetensors").hash
    round_ = town.federate(expect=list(NAMES), least=3)
    until(lambda: open_questions(town.place / "clown"), "the owner's question")
    town.running["clown"].stdin.write(b"y\n")
    town.running["clown"].stdin.flush()
    assert round_.wait(2 * PATIENCE) == 0, town.said("federate") + town.log()[-3000:]
    report = town.report()
    assert sorted(report["members"]) == sorted(report["received"]) == sorted(NAMES) and report["refused"] == {}
    assert report["members"]["clown"]["hash"] == content
    words = ["fuse", *(EXAMPLES / f"{name}.safetensors" for name in NAMES), "--method", "average", "--no-guard"]
    subprocess.run([sys.executable, "-m", "mixofshow", *map(str, words), "--as-delta", str(tmp_path / "alone.safetensors")], check=True)
    alone = (tmp_path / "alone.safetensors").read_bytes()
    assert Path(report["delta"]).read_bytes() == alone
    assert (town.place / "robot" / "fused.safetensors").read_bytes() == alone
    assert not (town.place / "clown" / "fused.safetensors").exists()
    assert "stranger" not in json.dumps(report)
    until(lambda: "SuperNode ended" in town.said("stranger"), "the stranger's end")


def test_nobody_is_asked_twice_and_nothing_is_sent_twice(town):
    code, report = town.round(expect=list(NAMES), remove=["steamtrain"])
    assert code == 0 and report["received"] == {} and sorted(report["members"]) == ["clown", "robot"]
    assert open_questions(town.place / "clown") == {}


def test_the_door_hides_what_the_superlink_shows_on_its_loopback(town):
    """Why there is a door: whoever reaches the SuperLink itself may act as its operator."""
    from flwr.proto.control_pb2 import ListNodesRequest

    trust = ssl.create_default_context(cafile=town.center / "tls" / "ca.pem")
    said = {}
    for address in (town.inner(), f"127.0.0.1:{town.port}"):
        headers = {"content-type": "application/x-protobuf", "accept": "application/x-protobuf"}
        with httpx.Client(base_url=f"https://{address}", verify=trust) as client:
            path = "/v1/control/list-nodes"
            said[address] = client.post(path, content=ListNodesRequest().SerializeToString(), headers=headers).status_code
    assert list(said.values()) == [200, 404]


@pytest.mark.parametrize("victim", ["node", "center", "app"])
def test_killed_and_started_again_a_round_goes_on(town, victim):
    """A client while it waits for its owner; the center at the same time; the center's app alone."""
    answers = town.place / "clown" / "said"
    for one in (*answers.glob("*"), *(town.place / "clown" / "asked").glob("*")):
        one.unlink()
    (town.center / "members.json").unlink(missing_ok=True)
    for one in (town.center / "concepts").glob("*"):
        one.unlink()
    round_ = town.federate(expect=list(NAMES), least=3)
    until(lambda: open_questions(town.place / "clown"), "the owner's question")
    (content,) = open_questions(town.place / "clown")
    if victim == "node":
        town.kill("clown")
        town.join("clown", "--concept", EXAMPLES / "clown.safetensors")
        answer(town.place / "clown", content, yes=True)
        assert round_.wait(2 * PATIENCE) == 0, town.said("federate")
    else:
        until(lambda: len(list((town.center / "concepts").glob("*"))) == 2, "the other two files")
        if victim == "center":
            town.kill("center")
            assert round_.wait(PATIENCE) in (2, 3), town.said("federate")
            (town.center / "center.json").unlink()
            town.start_center()
            until((town.center / "center.json").exists, "the center")
        else:
            for pid in processes("flwr-serverapp", str(town.center)):
                os.kill(pid, signal.SIGKILL)
            assert round_.wait(2 * PATIENCE) in (2, 3), town.said("federate")
        answer(town.place / "clown", content, yes=True)
        assert town.federate(expect=list(NAMES), least=3).wait(2 * PATIENCE) == 0, town.said("federate")
        assert list(town.report()["received"]) == ["clown"]
    assert town.report()["refused"] == {} and sorted(town.report()["members"]) == sorted(NAMES)


def processes(command, word):
    """Numbers of processes whose command line holds both."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if command in line and word in line and "superexec" not in line:
            found.append(int(path.parent.name))
    return found
