"""What a client does for its owner: tuning that a kill does not undo, figures of the fused model, and plain refusals."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Message
from PIL import Image

from mixofshow.errors import BadInputError, DatasetError, ResourceError, SettingsError
from mixofshow.evaluation.scorers import Scorer
from mixofshow.federation import join, judging, messages
from mixofshow.federation.center import ROUNDS, STATE, run_round, state_of
from mixofshow.federation.join import supernode
from mixofshow.federation.owner import (
    ASKED,
    ClientSettings,
    approved_before,
    open_questions,
    own_concept,
    read_settings,
    save_settings,
)
from mixofshow.federation.plan import Plan
from mixofshow.outputs import holding
from mixofshow.tuning import run

FEW = {"steps": 4, "batch_size": 1, "save_every": 1, "pictures": {"size": 64}}


class Killed(BaseException):
    """What no code of ours catches."""


def pictures(folder):
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "0.png")
    return folder


def test_tuning_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path, golden_pipeline, monkeypatch):
    offer = ClientSettings(name="thing", class_word="man", data=pictures(tmp_path / "data"))
    whole = own_concept(tmp_path / "whole", offer, golden_pipeline, FEW)
    save, saved = run.save, []

    def killing(folder, step, *more):
        save(folder, step, *more)
        saved.append(step)
        if step == 2 and len(saved) == 2:
            raise Killed

    monkeypatch.setattr(run, "save", killing)
    with pytest.raises(Killed):
        own_concept(tmp_path / "killed", offer, golden_pipeline, FEW)
    found = own_concept(tmp_path / "killed", offer, golden_pipeline, FEW)
    assert saved == [1, 2, 3]  # the last step needs no checkpoint
    assert found.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(run, "save", lambda *_: pytest.fail("tuned twice"))
    assert own_concept(tmp_path / "killed", offer, golden_pipeline, FEW) == found


def test_who_changes_the_pictures_has_another_concept_and_no_broken_off_tuning_in_the_way(tmp_path, golden_pipeline, monkeypatch):
    offer = ClientSettings(name="thing", class_word="man", data=pictures(tmp_path / "data"))
    first = own_concept(tmp_path, offer, golden_pipeline, FEW)
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "data" / "0.png")
    save = run.save
    monkeypatch.setattr(run, "save", lambda *given: (save(*given), (_ for _ in ()).throw(Killed)))
    with pytest.raises(Killed):
        own_concept(tmp_path, offer, golden_pipeline, FEW)
    monkeypatch.setattr(run, "save", save)
    Image.new("RGB", (16, 16), "green").save(tmp_path / "data" / "0.png")
    assert own_concept(tmp_path, offer, golden_pipeline, FEW).read_bytes() != first.read_bytes()


def test_what_counts_of_a_folder_is_what_tuning_reads(tmp_path, golden_pipeline):
    """Masks lie beside the pictures; what a file manager leaves among them is none."""
    offer = ClientSettings(name="thing", class_word="man", data=pictures(tmp_path / "data"))
    first = own_concept(tmp_path, offer, golden_pipeline, FEW)
    (tmp_path / "data" / ".DS_Store").write_bytes(b"x")
    assert own_concept(tmp_path, offer, golden_pipeline, FEW) == first
    (tmp_path / "masks").mkdir()
    Image.new("L", (16, 16), 255).save(tmp_path / "masks" / "0.png")
    assert own_concept(tmp_path, offer, golden_pipeline, FEW) != first


def test_a_client_judges_by_its_own_pictures_and_sends_three_numbers(federation, monkeypatch, tmp_path):
    def images(made):
        found = torch.stack([torch.frombuffer(bytearray(one.resize((4, 4)).tobytes()), dtype=torch.uint8).double() for one in made])
        return torch.nn.functional.normalize(found, dim=-1)

    monkeypatch.setattr("mixofshow.evaluation.scorers.scorer_for", lambda *args, **more: Scorer(images, lambda texts: None))
    monkeypatch.setattr(judging, "PICTURES", 1)
    monkeypatch.setattr(judging, "STEPS", 1)
    held_out = pictures(tmp_path / "held-out")
    federation.join("dogx", name="dogx", concept=federation.files["dogx"], approve="always", judge=held_out)
    federation.join("manx")
    report = federation.round(judge=True)
    assert report.refused == {}
    assert list(report.judged) == ["dogx"] and set(report.judged["dogx"]) == {"fused", "single", "base"}
    assert all(-1 <= value <= 1 for value in report.judged["dogx"].values())


@pytest.mark.parametrize("figures", [{"fused": float("nan")}, {"fused": 3.0}, {"fused": "high"}, {}])
def test_figures_that_are_none_are_not_noted(federation, figures):
    federation.join("dogx", name="dogx", concept=federation.files["dogx"], approve="always", judge=federation.folder)
    honest = federation.clients["dogx"]

    def lies(message):
        if message.metadata.message_type != messages.JUDGE:
            return honest(message)
        return Message(messages.content_of({"single": 0.5, "base": 0.1, **figures}), reply_to=message)

    federation.clients["dogx"] = lies
    report = federation.round(judge=True)
    assert report.judged == {} and report.fused and "dogx" in report.refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "dog"}, "`data`, a folder"),
        ({"name": "dog", "data": "x", "concept": "y"}, "not both"),
        ({"name": "dog", "data": "x"}, "needs `class_word`"),
        ({"name": "../dog", "concept": "y"}, "name"),
        ({"name": "dog", "concept": "y", "approve": "never"}, "approve"),
    ],
)
def test_an_offer_that_is_none_is_refused_in_one_line(given, said):
    with pytest.raises(SettingsError, match=said):
        ClientSettings(**given)


def test_a_folder_that_flower_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="quote"):
        supernode(tmp_path / 'a"b', "center:1", tmp_path, 1)


def test_a_round_without_a_center_says_how_to_start_one(tmp_path):
    with pytest.raises(BadInputError, match="mixofshow center"):
        state_of(tmp_path)



def test_a_second_client_in_a_folder_is_refused_and_leaves_the_first_ones_settings(tmp_path):
    first, second = (ClientSettings(name="dog", concept=tmp_path / "dog", approve=how) for how in ("ask", "always"))
    save_settings(tmp_path, first)
    with (
        holding(tmp_path),
        pytest.raises(BadInputError, match="another client runs there"),
        join.running_client(tmp_path, "center:1", tmp_path, second),
    ):
        pass
    assert read_settings(tmp_path) == first


def test_a_second_round_at_a_time_is_refused(tmp_path):
    (tmp_path / STATE).write_text('{"base": "emojiland"}')
    (tmp_path / ROUNDS).mkdir()
    with holding(tmp_path / ROUNDS), pytest.raises(BadInputError, match="a round is under way"):
        run_round(tmp_path, Plan())


NEVER = "the SuperNode ended; "
EXPELLED = "the center has expelled this client"


@pytest.mark.parametrize(
    ("ends", "said", "starts"),
    [
        ([(join.NOT_LET_IN, 1), (join.NOT_LET_IN, 1), ("another end", 1)], "another end", 3),
        ([(f"{join.GAVE_UP} after 30 seconds\n{join.CUT}", None), ("another end", 1)], "another end", 2),
        ([(join.IN, -9), (join.NOT_LET_IN, 1), ("another end", 1)], "another end", 3),
        ([(f"{join.IN} 1\n{join.TURNED_AWAY}", 0), (join.NOT_LET_IN, 1)], EXPELLED, 2),
        ([(f"{join.IN} 1\n{join.TURNED_AWAY}", 0), (f"{join.IN} 2", -9), (join.NOT_LET_IN, 1), ("another end", 1)], NEVER, 4),
        ([(join.TURNED_AWAY, 0)], "clock", 1),
        ([(join.NOT_LET_IN, 1), ("certificate", 1)], "certificate", 2),
    ],
    ids=["not admitted yet", "cut", "killed", "expelled", "known under another number", "clock", "another center's"],
)
def test_a_client_starts_again_unless_its_center_wants_it_no_more(tmp_path, monkeypatch, capsys, ends, said, starts):
    monkeypatch.setattr(join, "AGAIN_AFTER", 0.0)
    monkeypatch.setattr(join, "LOOKS_EVERY", 0.0)
    started = []

    @contextlib.contextmanager
    def start():
        text, code = ends[len(started)]
        started.append(text)
        with (tmp_path / join.LOG).open("a") as log:
            log.write(f"{text}\n")
        yield SimpleNamespace(poll=lambda: code)

    with pytest.raises((BadInputError, ResourceError), match=said):
        join.attend(start, tmp_path, lambda _: True)
    assert len(started) == starts
    refused = sum(join.NOT_LET_IN in one for one, _ in ends[:-1])
    assert capsys.readouterr().out.count("does not let this client in") == min(refused, 1)


def test_an_owner_is_asked_once_and_only_what_is_typed_then_is_an_answer(capsys):
    lines = iter(["y\n", None, None, "Y\n", None, "\n"])
    ask = join.asker(lambda: next(lines))
    assert [ask("send it?") for _ in range(4)] == [None, None, None, True]
    assert [ask("and that?") for _ in range(2)] == [None, False]
    assert capsys.readouterr().out.splitlines() == ["send it? [y/N]:", "and that? [y/N]:"]


def test_of_several_questions_each_is_put_when_the_one_before_is_answered(tmp_path, monkeypatch, capsys):
    """Of a round that was broken off, and of the next: both were put in turns for ever, and none took an answer."""
    monkeypatch.setattr(join, "LOOKS_EVERY", 0.0)
    (tmp_path / ASKED).mkdir()
    for content in "ab":
        (tmp_path / ASKED / content).write_text(f"send {content}?")
    lines, codes = iter(["", "y\n", "", "n\n"]), iter([None] * 4 + [1])

    @contextlib.contextmanager
    def start():
        yield SimpleNamespace(poll=lambda: next(codes))

    with pytest.raises(ResourceError):
        join.attend(start, tmp_path, join.asker(lambda: next(lines)))
    assert capsys.readouterr().out.splitlines() == ["send a? [y/N]:", "send b? [y/N]:"]
    assert [approved_before(tmp_path, content) for content in "ab"] == [True, False] and not open_questions(tmp_path)


def test_a_question_that_nobody_can_answer_says_so(monkeypatch, tmp_path):
    with (tmp_path / "empty").open("w+") as empty:
        monkeypatch.setattr("sys.stdin", empty)
        with pytest.raises(SettingsError, match="nobody can answer"):
            join.typed()


def test_a_client_whose_answer_came_too_late_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(join, "LOOKS_EVERY", 0.0)
    codes = iter([None, None, 1])

    @contextlib.contextmanager
    def start():
        def poll():
            with (tmp_path / join.LOG).open("a") as log:
                log.write(f"Run ID 7 {join.TOO_LATE} message 8.\n")
            return next(codes)

        yield SimpleNamespace(poll=poll)

    with pytest.raises(ResourceError):
        join.attend(start, tmp_path, lambda _: True)
    assert capsys.readouterr().out.count("ended without this client's answer") == 2


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes as Linux shows them")
def test_an_app_ends_at_once_with_the_process_that_started_it(tmp_path):
    app = tmp_path / "flwr-clientapp"
    begin = f"begin_app(pathlib.Path({str(tmp_path)!r}))"
    lines = ("import pathlib, time", "from mixofshow.federation.apps import begin_app", begin)
    app.write_text("\n".join([*lines, "print('up', flush=True)", "time.sleep(600)", ""]))
    starter = f"import subprocess, sys\none = subprocess.Popen([sys.executable, {str(app)!r}])\nprint(one.pid, flush=True)\none.wait()\n"
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        (pid,) = said - {"up"}
        parent.kill()
        end = time.monotonic() + 60
        while (state := Path(f"/proc/{pid}/stat")).exists() and state.read_text().split()[2] != "Z":
            assert time.monotonic() < end, "it lives on"
            time.sleep(0.1)


def test_a_yes_to_recordings_is_no_yes_to_the_file(tmp_path, monkeypatch):
    """One answer did for both: whoever asked for recordings first got the file unasked."""
    from mixofshow.federation import client

    asked = []
    found = SimpleNamespace(hash="0" * 64, info=SimpleNamespace(name="dog"))
    monkeypatch.setattr(client, "_base", lambda *_: None)
    monkeypatch.setattr(client, "_asked", lambda *_: {"fingerprint": "", "tune": "{}", "record": "{}", "has": ""})
    monkeypatch.setattr(client, "own_concept", lambda *_: tmp_path / "dog.safetensors")
    monkeypatch.setattr("mixofshow.concepts.concept.load_concept", lambda *_: found)
    monkeypatch.setattr(client, "approved", lambda _folder, _settings, content, _question: asked.append(content))
    (tmp_path / "dog.safetensors").touch()
    offer = ClientSettings(name="dog", concept=tmp_path / "dog.safetensors")
    for handler in (client.moments, client.concept):
        with pytest.raises(client.Declined):
            handler(None, tmp_path, offer)
    assert len(asked) == len(set(asked)) == 2


def test_what_goes_wrong_at_a_client_is_told_at_its_terminal_and_in_few_words_to_its_center(tmp_path, monkeypatch, capsys):
    from flwr.app import RecordDict

    from mixofshow.federation import client
    from mixofshow.federation.messages import REFUSED

    offer = ClientSettings(name="dog", class_word="dog", data=tmp_path / "pictures of alice")
    save_settings(tmp_path, offer)
    codes = iter([None, None, 1])

    def handler(*_):
        raise DatasetError(f"{offer.data}: no pictures")

    def asked():
        context = SimpleNamespace(node_config={"folder": str(tmp_path)})
        return client.answering(handler)(Message(RecordDict(), dst_node_id=1, message_type="query"), context)

    @contextlib.contextmanager
    def start():
        reply = asked()
        assert REFUSED in str(reply.content) and "alice" not in str(reply.content)
        yield SimpleNamespace(poll=lambda: next(codes))

    monkeypatch.setattr(join, "LOOKS_EVERY", 0.0)
    with pytest.raises(ResourceError):
        join.attend(start, tmp_path, lambda _: True)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "did not get" in line]
    assert "pictures of alice: no pictures; " in said


def test_a_client_whose_disk_is_full_tells_its_center_no_more_than_another(tmp_path, monkeypatch):
    """Flower sends the text of what an app raises: here the note for the owner could not be written, and said where."""
    from flwr.app import RecordDict

    from mixofshow.federation import client

    def full(folder, error):
        raise ResourceError(f"{folder}: no room left")

    def handler(*_):
        raise DatasetError("no pictures")

    monkeypatch.setattr(client, "note_wrong", full)
    monkeypatch.setattr(client, "read_settings", lambda _: None)
    context = SimpleNamespace(node_config={"folder": str(tmp_path)})
    asked = Message(RecordDict(), dst_node_id=1, message_type="query")
    reply = client.answering(handler)(asked, context)
    assert reply.content[messages.TABLE][messages.REFUSED] == client.FAILED
    monkeypatch.setattr("mixofshow.federation.secure.masked", handler)
    with pytest.raises(RuntimeError) as sent:
        client.sums(asked, context)
    assert str(sent.value) == client.FAILED
