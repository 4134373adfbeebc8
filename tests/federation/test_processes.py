"""A center and its clients as processes of their own, on the loopback, with TLS and node keys: started once.

Who is killed is started again, and the round goes on without tuning or asking twice. All but the door
is for the night (`-m slow`): each message is answered by a process that imports torch anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.bases.layers import layer, matrix
from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.delta import load_delta
from mixofshow.errors import BadInputError
from mixofshow.federation.center import state_of
from mixofshow.federation.control import control
from mixofshow.federation.keys import admit, make_node_key
from mixofshow.federation.owner import answer, open_questions
from mixofshow.federation.plan import SECURE
from mixofshow.fusion.stages import fuse

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes as Linux shows them")
EXAMPLES = Path(__file__).parents[2] / "examples" / "concepts"
ALL = ["clown", "robot", "steamtrain"]
FEW_LAYERS = re.compile(r"attn2\.to_[kv]")
RECORDED = {"steps": 2, "prompts": ["photo of a {}"], "picture_prompts": ["photo of a {}"]}
FUSED = {**RECORDED, "guard": False}
TUNED = {"steps": 12, "batch_size": 1, "save_every": 1, "unet": {"targets": "keys-and-values"}}
PATIENCE = 600.0
"""Seconds for what takes some ten on an idle machine."""


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
        (self.center / "center.json").unlink(missing_ok=True)
        self.start("center", "center", "--folder", self.center, "--host", "127.0.0.1", "--port", self.port)
        until((self.center / "center.json").exists, "the center")

    def join(self, name):
        ca = self.center / "tls" / "ca.pem"
        words = ("--ca", ca, "--name", name, "--folder", self.place / name, *self.offers[name])
        self.start(name, "join", f"127.0.0.1:{self.port}", *words)

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
        """A program of Flower's that works for a center's or client's folder."""
        for pid in processes(command, folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restart(self, name):
        self.kill(name)
        self.start_center() if name == "center" else self.join(name)

    def federate(self, **plan):
        table = {"wait": PATIENCE, "patience": PATIENCE, "fuse": FUSED, "tune": TUNED, "expect": ALL, "least": 3, **plan}
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

    def greeted(self):
        """How often the clown was asked who it is."""
        log = self.place / "clown" / "supernode.log"
        return log.read_text(errors="replace").count("Receiving: query.hello") if log.exists() else 0

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
            if home in (path / "environ").read_bytes().split(b"\0") and command.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Iterator[Town]:
    place = tmp_path_factory.mktemp("town")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    made = Town(place, port)
    subprocess.run([sys.executable, "-m", "mixofshow", "center", "keys", "--folder", str(made.center)], check=True)
    for name in ("clown", "robot"):
        whole = load_concept(EXAMPLES / f"{name}.safetensors")
        deltas = {layer: change for layer, change in whole.deltas.items() if FEW_LAYERS.search(layer)}
        dataclasses.replace(whole, deltas=deltas).save(place / f"{name}.safetensors")
    write_concept("steamtrain", place / "pictures")
    made.offers = {
        "clown": ["--concept", place / "clown.safetensors"],
        "robot": ["--concept", place / "robot.safetensors", "--want-model", "--approve", "always"],
        "steamtrain": ["--data", place / "pictures" / "train", "--class-word", "car", "--approve", "always"],
        "stranger": ["--concept", place / "clown.safetensors"],
    }
    for name in made.offers:
        line = make_node_key(place / name / "key")
        if name != "stranger":
            admit(made.center, name, line)
    made.start_center()
    for name in made.offers:
        made.join(name)
    yield made
    for one in made.running.values():
        one.terminate()
    for one in made.running.values():
        one.wait(60)
        one.stdin.close()


def fused_alone(town, out):
    """What `mixofshow fuse` makes of the three files."""
    (tuned,) = (town.place / "steamtrain" / "tuned").glob("*.safetensors")
    files = [*(town.place / f"{name}.safetensors" for name in ALL[:2]), tuned]
    (out / "fuse.yaml").write_text(json.dumps({"concepts": [str(one) for one in files], **FUSED}))
    words = ["fuse", out / "fuse.yaml", "--as-delta", out / "alone.safetensors"]
    subprocess.run([sys.executable, "-m", "mixofshow", *map(str, words)], check=True)
    return (out / "alone.safetensors").read_bytes()


@pytest.mark.slow
def test_a_round_of_three_equals_fuse_of_their_files_and_a_stranger_is_refused(town, tmp_path):
    round_ = town.federate()
    content = town.question()
    town.running["clown"].stdin.write(b"y\n")
    town.running["clown"].stdin.flush()
    report = town.ended(round_)
    assert sorted(report["members"]) == sorted(report["received"]) == ALL and report["refused"] == {}
    assert report["members"]["clown"]["hash"] == content
    alone = fused_alone(town, tmp_path)
    assert Path(report["delta"]).read_bytes() == alone
    assert (town.place / "robot" / "fused.safetensors").read_bytes() == alone
    assert not (town.place / "clown" / "fused.safetensors").exists()
    assert "stranger" not in json.dumps(report)
    until(lambda: "is not admitted yet" in town.said("stranger"), "what the stranger is told")


@pytest.mark.slow
def test_nobody_is_asked_twice_and_nothing_is_sent_twice(town):
    report = town.ended(town.federate(remove=["steamtrain"], least=2))
    assert report["received"] == {} and sorted(report["members"]) == ALL[:2]
    assert open_questions(town.place / "clown") == {}


def test_the_door_hides_what_the_superlink_shows_on_its_loopback(town):
    """Why there is a door: whoever reaches the SuperLink itself may act as its operator."""
    from flwr.proto.control_pb2 import ListNodesRequest

    with control(town.center, state_of(town.center).inner) as client:
        assert {node.name for node in client.ListNodes(ListNodesRequest()).nodes_info} == set(ALL)
    with pytest.raises(BadInputError, match="refused"), control(town.center, f"127.0.0.1:{town.port}") as client:
        client.ListNodes(ListNodesRequest())


@pytest.mark.slow
def test_clients_killed_while_they_tune_ask_or_wait_for_the_model_cost_a_round_nothing(town, tmp_path):
    town.forget()
    round_ = town.federate()
    until(town.checkpoints, "tuning")
    town.restart("steamtrain")
    content = town.question()
    town.restart("clown")
    answer(town.place / "clown", content, yes=True)
    until(lambda: town.arrived() == ALL, "the three files")
    (town.place / "robot" / "fused.safetensors").unlink(missing_ok=True)
    town.restart("robot")
    report = town.ended(round_)
    assert report["refused"] == {} and sorted(report["members"]) == ALL
    assert Path(report["delta"]).read_bytes() == fused_alone(town, tmp_path)
    assert (town.place / "robot" / "fused.safetensors").read_bytes() == Path(report["delta"]).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["center", "app"])
def test_a_center_killed_at_three_steps_goes_on_with_what_it_has(town, tmp_path, victim):
    """The whole center, or the round's own process alone, which its operator breaks off then.

    Clients go on with what they were about, and answer the next round when it is done.
    """
    town.forget()
    for step in ("tuning and asking", "meeting", "fusing"):
        round_, greeted = town.federate(), town.greeted()
        if step == "tuning and asking":
            until(town.checkpoints, "tuning")
            content = town.question()
        elif step == "meeting":
            until(lambda before=greeted: town.greeted() > before, "the first question")
        else:
            until(lambda: town.arrived() == ALL, "the three files")
        if victim == "center":
            town.kill("center")
            assert round_.wait(PATIENCE) in (2, 3), town.why()
            town.start_center()
        else:
            town.kill_program("flwr-serverapp", town.center)
            if step != "meeting":  # there it is waited for that Flower notices
                round_.send_signal(signal.SIGINT)
            assert round_.wait(PATIENCE) in (2, 3, 130), town.why()
        if step == "tuning and asking":
            answer(town.place / "clown", content, yes=True)
    before = set(town.checkpoints())
    report = town.ended(town.federate())
    assert report["received"] == {} and report["refused"] == {} and sorted(report["members"]) == ALL
    assert Path(report["delta"]).read_bytes() == fused_alone(town, tmp_path)
    assert open_questions(town.place / "clown") == {} and set(town.checkpoints()) == before


@pytest.mark.slow
def test_a_network_that_is_cut_for_a_while_costs_a_round_nothing(town):
    """The center's door answers nobody for longer than a client may be silent."""
    town.forget()
    round_ = town.federate()
    content = town.question()
    town.running["center"].send_signal(signal.SIGSTOP)
    time.sleep(80)
    answer(town.place / "clown", content, yes=True)
    town.running["center"].send_signal(signal.SIGCONT)
    report = town.ended(round_)
    assert report["refused"] == {} and sorted(report["members"]) == ALL


@pytest.mark.slow
def test_what_starts_apps_is_started_again_at_the_center_and_at_a_client(town):
    for folder in (town.center, town.place / "robot"):
        (old,) = processes("flower-superexec", folder)
        town.kill_program("flower-superexec", folder)
        until(lambda where=folder, gone=old: set(processes("flower-superexec", where)) - {gone}, "another one")
    report = town.ended(town.federate(remove=["clown", "steamtrain"], expect=["robot"], least=1))
    assert report["refused"] == {} and list(report["members"]) == ["robot"]


@pytest.mark.slow
def test_a_secure_round_of_real_clients_gives_independent_fusion(town):
    town.forget()
    round_ = town.federate(secure=True, fuse=RECORDED)
    answer(town.place / "clown", town.question(), yes=True)
    report = town.ended(round_)
    assert report["refused"] == {} and sorted(report["members"]) == ALL
    (tuned,) = (town.place / "steamtrain" / "tuned").glob("*.safetensors")
    base = load_base("emojiland")
    plain = fuse([*(town.place / f"{name}.safetensors" for name in ALL[:2]), tuned], base, **RECORDED, **SECURE).model.weights
    found = load_delta(Path(report["delta"])).weights(base)
    assert found.keys() == plain.keys()
    error = torch.stack([(found[name] - plain[name]).double().norm() for name in plain]).norm()
    change = torch.stack([(plain[name] - matrix(layer(base, name))).double().norm() for name in plain]).norm()
    assert error < 1e-4 * change
