"""A center and its clients as processes of their own, on the loopback, with TLS and node keys: started once.

Who is killed is started again, and the round goes on without tuning or asking twice. All but one round and the door is
for the night (`-m slow`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.bases.layers import layer, matrix
from mixofshow.bases.loading import load_base
from mixofshow.cli import main
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.delta import load_delta
from mixofshow.errors import BadInputError
from mixofshow.federation.center import state_of
from mixofshow.federation.control import control, register_members
from mixofshow.federation.exchange import GONE
from mixofshow.federation.keys import admit, expel, make_node_key
from mixofshow.federation.owner import answer, open_questions
from mixofshow.federation.plan import SECURE
from mixofshow.fusion.stages import fuse
from tests.federation.town import (
    ALL,
    APP,
    FUSED,
    LYING,
    OF_ALICE,
    OLD,
    PATIENCE,
    RECORDED,
    Town,
    overheard,
    processes,
    until,
)

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes as Linux shows them")
EXAMPLES = Path(__file__).parents[2] / "examples" / "concepts"
FEW_LAYERS = re.compile(r"attn2\.to_[kv]")


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
    (place / "pictures" / "train" / "00.txt").write_text("a <steamtrain> behind the house of alice")
    made.has_habit("steamtrain", OF_ALICE)
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
    with overheard(made.center, port, made.sent) as way:
        made.ways["steamtrain"] = way
        for name in made.offers:
            made.join(name)
        yield made
        for one in made.running.values():
            one.terminate()
        for one in made.running.values():
            one.wait(60)
            one.stdin.close()


def assert_nothing_of_alice(town):
    """In all that her client, the steam train's, has sent: nothing of her machine, paths, captions or pictures."""
    said = b"\n".join(town.sent)
    assert b"<steamtrain1>" in said, "what was heard is not what was sent"
    secrets = [b"alice", str(town.place).encode(), b"sitecustomize"]
    for path in (town.place / "pictures" / "train").glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        secrets += [path.read_bytes()[60:100], max(pixels, key=lambda row: len(np.unique(row))).tobytes()[:48]]
    assert len(secrets) > 3
    for secret in secrets:
        assert secret not in said, secret


def fused_alone(town, out):
    """What `mixofshow fuse` makes of the three files."""
    (tuned,) = (town.place / "steamtrain" / "tuned").glob("*.safetensors")
    files = [*(town.place / f"{name}.safetensors" for name in ALL[:2]), tuned]
    (out / "fuse.yaml").write_text(json.dumps({"concepts": [str(one) for one in files], **FUSED}))
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr("sys.argv", ["mixofshow", "fuse", f"{out}/fuse.yaml", "--as-delta", f"{out}/alone.safetensors"])
        main()
    return (out / "alone.safetensors").read_bytes()


def test_a_round_of_three_equals_fuse_of_their_files_and_a_stranger_is_refused(town, tmp_path):
    round_ = town.federate()
    content = town.question()
    until(lambda: "[y/N]" in town.said("clown"), "the question at the terminal")
    town.running["clown"].stdin.write(b"y\n")
    town.running["clown"].stdin.flush()
    report = town.ended(round_)
    assert sorted(report["members"]) == sorted(report["received"]) == ALL and report["refused"] == {}
    assert report["members"]["clown"]["hash"] == content
    alone = fused_alone(town, tmp_path)
    assert Path(report["delta"]).read_bytes() == alone
    assert (town.place / "robot" / "fused.safetensors").read_bytes() == alone
    assert not (town.place / "clown" / "fused.safetensors").exists()
    assert_nothing_of_alice(town)
    (tuned,) = (town.place / "steamtrain" / "tuned").glob("*.safetensors")
    assert any(tuned.read_bytes() in one for one in town.sent)
    assert "stranger" not in json.dumps(report)
    until(lambda: "is not admitted yet" in town.said("stranger"), "what the stranger is told")


def test_the_door_hides_what_the_superlink_shows_on_its_loopback(town):
    """Why there is a door: whoever reaches the SuperLink itself may act as its operator."""
    from flwr.proto.control_pb2 import ListNodesRequest

    with control(town.center, state_of(town.center).inner) as client:
        assert {node.name for node in client.ListNodes(ListNodesRequest()).nodes_info} == set(ALL)
    with pytest.raises(BadInputError, match="refused"), control(town.center, f"127.0.0.1:{town.port}") as client:
        client.ListNodes(ListNodesRequest())


def test_who_was_expelled_may_be_admitted_again_and_by_another_name(town):
    """Flower takes no key twice: one that was struck off once ended every round, and the center's start."""
    from flwr.proto.control_pb2 import ListNodesRequest

    key = make_node_key(town.place / "guest")
    with control(town.center, state_of(town.center).inner) as client:

        def listed():
            register_members(client, town.center)
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
            return {node.name for node in nodes if node.status != "unregistered"} - set(ALL)

        for name in ("guest", "guest", "visitor"):
            admit(town.center, name, key)
            assert listed() == listed() == {name}
            expel(town.center, name)
            if name == "guest":  # the visitor is known by another name at once
                assert listed() == set()
        admit(town.center, "guest", key)
        assert listed() == {"guest"}
        expel(town.center, "guest")
        assert listed() == set()


@pytest.mark.slow
def test_a_client_that_is_expelled_ends_and_says_so(town):
    admit(town.center, "stranger", make_node_key(town.place / "stranger" / "key"))
    with control(town.center, state_of(town.center).inner) as client:
        register_members(client, town.center)
        until(lambda: town.let_in("stranger"), "the stranger's coming in")
        expel(town.center, "stranger")
        register_members(client, town.center)
    assert town.running["stranger"].wait(PATIENCE) == 2
    assert town.said("stranger").splitlines()[-1].endswith("has expelled this client: its key is on the list no more")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["client", "node"])
def test_clients_killed_while_they_tune_ask_or_wait_for_the_model_cost_a_round_nothing(town, tmp_path, victim):
    """The whole client, or its SuperNode alone, which it starts again itself."""
    kill = town.restart if victim == "client" else town.kill_node
    town.forget()
    round_ = town.federate()
    until(town.checkpoints, "tuning")
    kill("steamtrain")
    content = town.question()
    kill("clown")
    answer(town.place / "clown", content, yes=True)
    until(lambda: town.arrived() == ALL, "the three files")
    (town.place / "robot" / "fused.safetensors").unlink(missing_ok=True)
    kill("robot")
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
        round_, greeted = town.federate(), town.heard("clown", "query.hello")
        if step == "tuning and asking":
            until(town.checkpoints, "tuning")
            content = town.question()
        elif step == "meeting":
            until(lambda before=greeted: town.heard("clown", "query.hello") > before, "the first question")
        else:
            until(lambda: town.arrived() == ALL, "the three files")
        if victim == "center":
            town.kill("center")
            assert round_.wait(PATIENCE) in (2, 3), town.why()
            town.start_center()
        else:
            town.kill_program(APP, town.center)
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
    time.sleep(45)
    answer(town.place / "clown", content, yes=True)
    town.running["center"].send_signal(signal.SIGCONT)
    report = town.ended(round_)
    assert report["refused"] == {} and sorted(report["members"]) == ALL


@pytest.mark.slow
def test_what_starts_apps_is_started_again_and_nobody_is_asked_or_sends_twice(town):
    for folder in (town.center, town.place / "robot"):
        (old,) = processes("flower-superexec", folder)
        town.kill_program("flower-superexec", folder)
        until(lambda where=folder, gone=old: set(processes("flower-superexec", where)) - {gone}, "another one")
    report = town.ended(town.federate(remove=["steamtrain"], least=2))
    assert report["received"] == report["refused"] == {} and sorted(report["members"]) == ALL[:2]
    assert open_questions(town.place / "clown") == {}


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
    assert_nothing_of_alice(town)


def hostile_files(place):
    """What clients send in place of their concept, and what is said of it."""
    concept = load_concept(place / "clown.safetensors")
    numbers = {name: one.clone() for name, one in concept.tensors().items()}
    next(iter(numbers.values())).fill_(float("nan"))
    of_another = concept.info.model_copy(update={"base_fingerprint": "0" * 16})
    dataclasses.replace(concept, info=of_another).save(place / "of-another.safetensors")
    return {
        "nan": (save(numbers, concept.metadata()), "not finite"),
        "pickle": (b"\x80\x04\x95" + b"\xff" * 64, "pickle"),
        "bomb": ((2**60).to_bytes(8, "little") + b"{}", "header of"),
        "liar": ((place / "of-another.safetensors").read_bytes(), "made for base"),
    }


@pytest.mark.slow
def test_hostile_clients_cost_the_others_nothing_and_are_named(town, tmp_path):
    """They have keys and TLS as others have, and run programs of their own in our app's place."""
    (tmp_path / "clown.safetensors").write_bytes((town.place / "clown.safetensors").read_bytes())
    files = hostile_files(tmp_path)
    for name, (data, _) in files.items():
        (town.has_habit(name, LYING) / "sent").write_bytes(data)
    town.has_habit("old", OLD)
    said = {**{name: why for name, (_, why) in files.items()}, "old": "version 0 of the protocol", "dying": GONE}
    for name in said:
        town.offers[name] = ["--concept", tmp_path / "clown.safetensors", "--approve", "ask" if name == "dying" else "always"]
        admit(town.center, name, make_node_key(town.place / name / "key"))
    with control(town.center, state_of(town.center).inner) as client:
        register_members(client, town.center)
    for name in said:
        town.join(name)
    town.forget()
    round_ = town.federate(expect=[*ALL, *said], wait=120)
    answer(town.place / "clown", town.question(), yes=True)
    until(lambda: town.heard("dying", "train.concept"), "the last question to the dying")
    town.kill("dying")
    report = town.ended(round_)
    assert {name: why in report["refused"].pop(name, "") for name, why in said.items()} == dict.fromkeys(said, True)
    assert report["refused"] == {} and sorted(report["members"]) == ALL
    assert Path(report["delta"]).read_bytes() == fused_alone(town, tmp_path)
