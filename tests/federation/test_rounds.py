"""Rounds between a center and its clients, in one process: what is fused, what is refused, and what is asked twice."""

from __future__ import annotations

import dataclasses
import json
import platform
import socket
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message
from PIL import Image
from safetensors.torch import load_file, save_file

from mixofshow.concepts.changes import LowRank
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.model import load_model
from mixofshow.errors import SettingsError
from mixofshow.federation import judging, messages
from mixofshow.federation.exchange import GONE, NODE_UNAVAILABLE
from mixofshow.federation.messages import content_of
from mixofshow.federation.outcome import told
from mixofshow.federation.owner import answer, open_questions
from mixofshow.federation.plan import Plan
from mixofshow.fusion.stages import fuse
from mixofshow.fusion.statistics import LayerStatistics
from mixofshow.fusion.store import Store, open_recording
from tests.federation.local import QUICK

THREE = ("dogx", "manx", "catx")


def fused_files(federation, names, place):
    """The files' model, by `fuse` alone."""
    model = fuse([federation.files[name] for name in names], federation.base, **QUICK).model
    model.save_delta(place / "alone.safetensors")
    return (place / "alone.safetensors").read_bytes()


def test_a_round_fuses_what_fuse_makes_of_the_same_files_bit_for_bit_also_when_members_come_and_go(federation, tmp_path):
    for name in THREE[:2]:
        federation.join(name)
    first = federation.round(1)
    assert first.refused == {} and sorted(first.members) == sorted(THREE[:2])
    assert Path(first.delta).read_bytes() == fused_files(federation, THREE[:2], tmp_path)
    federation.join(THREE[2])
    second = federation.round(2)
    assert sorted(second.received) == ["catx"]
    assert Path(second.delta).read_bytes() == fused_files(federation, THREE, tmp_path)
    third = federation.round(3, remove=["manx"])
    assert third.received == {}
    assert Path(third.delta).read_bytes() == fused_files(federation, ("dogx", "catx"), tmp_path)
    again = federation.round(4, remove=["manx"])  # the same plan, whose member is gone
    assert Path(again.delta).read_bytes() == Path(third.delta).read_bytes()


def test_who_wants_the_model_gets_it_and_nobody_else(federation):
    own = {"approve": "always"}
    federation.join("dogx", name="dogx", concept=federation.files["dogx"], want_model=True, **own)
    federation.join("manx")
    report = federation.round()
    assert (federation.folder / "client-dogx" / "fused.safetensors").read_bytes() == Path(report.delta).read_bytes()
    assert not (federation.folder / "client-manx" / "fused.safetensors").exists()
    assert load_model(federation.folder / "client-dogx" / "fused.safetensors").concept_hashes
    sent = report.received
    assert list(told(vars(report))) == [
        f"dogx: <dogx>, sent {sent['dogx']} bytes, has the model",
        f"manx: <manx>, sent {sent['manx']} bytes",
        f"{report.fused}: concepts fused: 2; as a delta: {report.delta}",
    ]


def test_the_guard_hears_a_concept_that_would_drown_the_others(federation, tmp_path):
    loud = load_concept(federation.files["manx"])
    deltas = {name: LowRank(1000 * one.down, one.up) for name, one in loud.deltas.items()}
    dataclasses.replace(loud, deltas=deltas).save(tmp_path / "manx.safetensors")
    for name in ("dogx", "catx"):
        federation.join(name)
    federation.join("manx", name="manx", concept=tmp_path / "manx.safetensors", approve="always")
    report = federation.round()
    assert list(report.verdicts) == ["manx"] and report.refused == {}
    assert f"guard: <manx> {report.verdicts['manx']}" in told(vars(report))


def test_moments_that_clients_recorded_give_the_model_that_the_center_would_make(federation, tmp_path, monkeypatch):
    for name in THREE[:2]:
        federation.join(name)
    independent = {**QUICK, "mode": "independent"}
    report = federation.round(1, moments=True, fuse=independent)
    model = fuse([federation.files[name] for name in THREE[:2]], federation.base, **independent).model
    model.save_delta(tmp_path / "alone.safetensors")
    assert Path(report.delta).read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    # and the center draws nothing
    monkeypatch.setattr("mixofshow.fusion.stages.record", lambda *a, **k: pytest.fail("the center drew"))
    monkeypatch.setattr("mixofshow.federation.rounds.Round._collect_moments", lambda self: None)
    assert federation.round(2, moments=True, fuse=independent).fused


def replaced_file(change):
    """A client that sends other bytes than its file's."""

    def made(federation):
        honest = federation.clients["manx"]

        def lie(message):
            reply = honest(message)
            if message.metadata.message_type != messages.CONCEPT:
                return reply
            data = change(federation.files["manx"].read_bytes(), federation)
            return Message(content_of({"hash": "0" * 64}, {"concept": data}), reply_to=message)

        return lie

    return made


def spoilt(data, federation):
    """The file with a number that is none."""
    concept = load_concept(federation.files["manx"])
    tensors = dict(concept.tensors())
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, federation.folder / "hostile.safetensors", concept.metadata())
    return (federation.folder / "hostile.safetensors").read_bytes()


def other_base(data, federation):
    """A file that says that it is of another base."""
    concept = load_concept(federation.files["manx"])
    info = concept.info.model_copy(update={"base_fingerprint": "0" * 16})
    dataclasses.replace(concept, info=info).save(federation.folder / "other.safetensors")
    return (federation.folder / "other.safetensors").read_bytes()


def old(federation):
    """A client that speaks a version that nobody knows."""

    def speak(message):
        content = content_of({})
        content.config_records[messages.TABLE]["protocol"] = 0
        return Message(content, reply_to=message)

    return speak


def silent(federation):
    """A client that never answers."""
    return lambda message: None


def nonsense(federation):
    """A client that answers with other things than asked for."""
    return lambda message: Message(content_of({"name": 3, "hash": b"x"}), reply_to=message)


HOSTILE = {
    "NaN": (replaced_file(spoilt), "not finite"),
    "pickle": (replaced_file(lambda data, federation: b"\x80\x04\x95" + b"\xff" * 64), "pickle"),
    "bomb": (replaced_file(lambda data, federation: (2**60).to_bytes(8, "little") + b"{}"), "header of"),
    "cut": (replaced_file(lambda data, federation: data[:-1000]), "cut"),
    "other base": (replaced_file(other_base), "made for base"),
    "another's name": (replaced_file(lambda data, federation: (federation.files["dogx"]).read_bytes()), "placeholder"),
    "old version": (old, "version 0 of the protocol"),
    "silent": (silent, "in time"),
    "nonsense": (nonsense, "expected"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_client_costs_the_others_nothing_and_is_named(federation, tmp_path, kind):
    make, said = HOSTILE[kind]
    for name in THREE:
        federation.join(name)
    federation.clients["manx"] = make(federation)
    report = federation.round(patience=0.5 if kind == "silent" else 60, wait=0.5 if kind == "silent" else 60)
    assert f"manx: refused: {report.refused['manx']}" in told(vars(report))
    assert said in report.refused.pop("manx")
    assert report.refused == {}
    assert Path(report.delta).read_bytes() == fused_files(federation, ("dogx", "catx"), tmp_path)


def test_a_recording_that_is_none_is_refused_and_the_others_are_fused(federation, tmp_path):
    """Sums of squares below 0, with digests that fit; it was kept, and ended the fusing of all."""
    for name in THREE[:2]:
        federation.join(name)
    honest = federation.clients["manx"]

    def lie(message):
        reply = honest(message)
        if message.metadata.message_type != messages.MOMENTS:
            return reply
        (tmp_path / "sent").write_bytes(messages.file_of(reply, "recording", messages.MAX_RECORDING))
        true = open_recording(tmp_path / "sent")
        seen = {one: true.statistics(one) for one in true.info.rows}
        below = {one: LayerStatistics(-found.moments, found.rows) for one, found in seen.items()}
        false = Store(tmp_path / "false").save(true.info.key, "manx", below)
        return Message(content_of({"hash": "0" * 64}, {"recording": false.file.path.read_bytes()}), reply_to=message)

    federation.clients["manx"] = lie
    independent = {**QUICK, "mode": "independent"}
    report = federation.round(1, moments=True, fuse=independent)
    assert "negative" in report.refused["manx"] and sorted(report.members) == ["dogx", "manx"]
    fuse([federation.files[name] for name in THREE[:2]], federation.base, **independent).model.save_delta(tmp_path / "alone.safetensors")
    assert Path(report.delta).read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_a_file_that_is_too_large_is_not_taken(federation, monkeypatch):
    monkeypatch.setattr(messages, "MAX_CONCEPT", 1000)
    federation.join("dogx")
    report = federation.round()
    assert "at most 1000 are taken" in report.refused["dogx"] and not report.fused


def test_a_client_with_another_base_sends_nothing(federation, monkeypatch, v_pipeline):
    federation.join("dogx")
    monkeypatch.setattr("mixofshow.bases.loading.load_base", lambda *args, **more: v_pipeline)
    report = federation.round()
    assert "has another base model" in report.refused["dogx"]
    assert all(messages.FILES not in reply.content.array_records for reply in federation.grid.sent)


def test_nothing_of_the_owners_is_in_what_is_sent_not_even_in_errors(federation, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "machine-of-alice")
    monkeypatch.setattr(platform, "node", lambda: "machine-of-alice")
    secret = tmp_path / "home-of-alice"
    secret.mkdir()
    federation.join("dogx", name="dogx", class_word="cook", data=secret, approve="always")  # holds no picture
    federation.join("manx")
    report = federation.round(moments=True)
    assert report.refused["dogx"].endswith("the client's own log says why")
    assert_nothing_of_alice(federation)


def test_nothing_of_pictures_and_captions_is_in_what_is_tuned_recorded_judged_and_summed(federation, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "machine-of-alice")
    monkeypatch.setattr(judging, "judge", lambda *_: {"fused": 0.5, "single": 0.5, "base": 0.5})
    monkeypatch.setattr("mixofshow.evaluation.scorers.scorer_for", lambda *args, **more: None)
    home = tmp_path / "home-of-alice"
    home.mkdir()
    noise = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(home / "alice-and-rex.png")
    (home / "alice-and-rex.txt").write_text("alice walks <thing>")
    federation.join("thing", name="thing", class_word="man", data=home, judge=home, approve="always")
    for name in THREE[:2]:
        federation.join(name)
    few = {"steps": 1, "batch_size": 1, "pictures": {"size": 64}, "unet": {"targets": "keys-and-values"}}
    picture = (home / "alice-and-rex.png").read_bytes()
    for more in ({"moments": True, "judge": True, "fuse": {**QUICK, "mode": "independent"}}, {"secure": True, "least": 3}):
        report = federation.round(tune=few, **more)
        assert report.refused == {} and "thing" in report.members and report.fused
        assert_nothing_of_alice(federation, picture[40:80], noise.tobytes()[:48])


def assert_nothing_of_alice(federation, *secrets):
    """Of her name, paths, machine or pictures, in all that her client sent."""
    for reply in federation.grid.sent:
        said = b"".join([str(vars(reply.metadata)).encode(), *(one.deflate() for one in reply.content.values())])
        said += b"".join(array.data for record in reply.content.array_records.values() for array in record.values())
        for secret in (b"alice", str(federation.folder).encode(), b"/home", b"/root", b"machine-of", *secrets):
            assert secret not in said, secret


def test_the_owner_is_asked_once_and_their_no_is_final(federation):
    federation.join("dogx", name="dogx", concept=federation.files["dogx"], approve="ask")
    federation.join("manx")
    folder, content = federation.folder / "client-dogx", load_concept(federation.files["dogx"]).hash
    answer(folder, content, yes=False)
    report = federation.round(1)
    assert report.refused == {"dogx": "its owner does not approve"} and sorted(report.members) == ["manx"]
    answer(folder, content, yes=True)
    assert sorted(federation.round(2).members) == ["dogx", "manx"]
    assert open_questions(folder) == {}


def test_a_center_cannot_make_a_client_read_other_files():
    for key in ("data", "masks", "prior.data", "base", "name"):
        with pytest.raises(SettingsError, match=key):
            Plan(tune={key: "/etc"})
    with pytest.raises(SettingsError, match="prior"):
        Plan(tune={"prior": {"data": "/etc"}})


def test_a_node_that_comes_back_is_asked_again(federation):
    federation.join("dogx")
    honest, lost = federation.clients["dogx"], []

    def killed_once(message):
        if message.metadata.message_type == messages.CONCEPT and not lost:
            lost.append(message)
            federation.grid.activated[1] = "2999-01-01T00:00:00+00:00"
            return None
        federation.grid.activated.pop(1, None)
        return honest(message)

    federation.clients["dogx"] = killed_once
    assert federation.round().refused == {} and lost


def test_who_goes_away_and_does_not_come_back_is_given_up_long_before_patience_ends(federation):
    for name in THREE[:2]:
        federation.join(name)
    honest = federation.clients["manx"]

    def leaves(message):
        if message.metadata.message_type != messages.CONCEPT:
            return honest(message)
        del federation.grid.clients[2]
        return Message(Error(NODE_UNAVAILABLE), reply_to=message)

    federation.clients["manx"] = leaves
    report = federation.round(wait=0.3, patience=600)
    assert report.refused == {"manx": GONE} and sorted(report.members) == ["dogx"]


def test_state_is_json_that_people_can_read(federation):
    federation.join("dogx")
    federation.round()
    table = json.loads((federation.folder / "members.json").read_text())
    assert table["dogx"]["concept"] == "dogx" and load_file(federation.folder / "concepts" / f"{table['dogx']['hash']}.safetensors")
