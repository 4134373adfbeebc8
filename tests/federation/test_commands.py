"""What the commands say before anything is started."""

import contextlib
from unittest.mock import Mock

import pytest

from mixofshow.cli import main
from mixofshow.errors import BadInputError
from mixofshow.federation import center
from mixofshow.federation.center import CenterState
from mixofshow.federation.door import open_door
from mixofshow.federation.join import look_for
from mixofshow.federation.keys import admit, make_node_key, make_tls
from mixofshow.federation.launch import free_port
from mixofshow.federation.plan import Plan

KEY = "expected a key as `mixofshow join` prints it"


def told(words, capsys, monkeypatch):
    """Exit code and what is said of a command that ends at once."""
    monkeypatch.setattr("sys.argv", ["mixofshow", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["center", "admit", "bob", ""], KEY),
        (["center", "admit", "bob", "bob.pub"], KEY),
        (["join", "center.example:8000", "--ca", "ca.pem", "--data", "pictures"], "--name is missing"),
    ],
    ids=["no key", "a file that is not there", "a concept without a name"],
)
def test_what_is_missing_is_named(words, said, capsys, monkeypatch, tmp_path):
    pytest.importorskip("flwr")
    monkeypatch.chdir(tmp_path)
    code, found = told(words, capsys, monkeypatch)
    assert code == 2 and said in found


@pytest.mark.parametrize("name", ["münchen.example", "center.example:8000", "http://center.example", "my center", ""])
def test_a_certificate_is_for_names_that_machines_may_have(name, tmp_path):
    """For others it is good for nothing, which was found out at the clients."""
    with pytest.raises(BadInputError, match="expected a name or address of a machine, without a port"):
        make_tls(tmp_path, [name])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("center.example", "the center's address and port"),
        ("127.0.0.1:70000", "the center's address and port"),
        ("http://127.0.0.1:80", "name or address of a machine"),
    ],
)
def test_what_is_no_address_of_a_center_is_refused(address, said, tmp_path):
    with pytest.raises(BadInputError, match=said):
        look_for(address, tmp_path)


def test_a_client_is_told_where_nobody_answers_yet_and_of_another_center_and_of_what_is_no_certificate(tmp_path, capsys):
    """All three were tried again and again in silence."""
    pytest.importorskip("uvicorn")
    for whose in ("ours", "theirs"):
        make_tls(tmp_path / whose, [])
    ours, theirs = (tmp_path / whose / "tls" / "ca.pem" for whose in ("ours", "theirs"))
    address = f"127.0.0.1:{free_port()}"
    look_for(address, ours)
    assert f"nobody answers at {address} yet" in capsys.readouterr().out
    with open_door(tmp_path / "ours", "127.0.0.1", int(address.partition(":")[2]), "127.0.0.1:1"):
        look_for(address, ours)
        assert not capsys.readouterr().out
        with pytest.raises(BadInputError, match="not the center of"):
            look_for(address, theirs)
    with pytest.raises(BadInputError, match="not the center's certificate"):
        look_for(address, tmp_path / "ours" / "tls" / "server.key")


def test_a_round_does_not_wait_for_whom_nobody_admitted(capsys, monkeypatch, tmp_path):
    pytest.importorskip("flwr")
    (tmp_path / "center.json").write_text(CenterState(base="emojiland").model_dump_json())
    (tmp_path / "round.yaml").write_text("expect: [bbo]\n")
    admit(tmp_path, "bob", make_node_key(tmp_path / "key"))
    code, said = told(["federate", str(tmp_path / "round.yaml"), "--folder", str(tmp_path)], capsys, monkeypatch)
    assert code == 2 and "'bbo' is not admitted; did you mean 'bob'?" in said


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit], ids=["Ctrl-C", "SIGTERM"])
def test_a_round_that_is_broken_off_is_stopped_at_the_center_too(signal, monkeypatch, tmp_path):
    """After SIGTERM its clients went on to tune."""
    pytest.importorskip("flwr")
    (tmp_path / "center.json").write_text(CenterState(base="emojiland").model_dump_json())
    stopped = []
    monkeypatch.setattr(center, "control", lambda *_: contextlib.nullcontext("client"))
    monkeypatch.setattr(center, "start_run", lambda *_: 7)
    for name in ("register_members", "stop_all_runs"):
        monkeypatch.setattr(center, name, lambda *_: None)
    monkeypatch.setattr(center, "stop_run", lambda _, number: stopped.append(number))
    monkeypatch.setattr(center, "_ended", Mock(side_effect=signal))
    with pytest.raises(signal):
        center.run_round(tmp_path, Plan())
    assert stopped == [7]
