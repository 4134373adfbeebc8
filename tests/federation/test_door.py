"""Who comes in: keys and certificates, the front door, and the app that clients take."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore import sql_mixin
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable import inflatable_utils
from flwr.supernode.start_client_internal import _verify_fab

from mixofshow.errors import BadInputError
from mixofshow.federation import bundle, center, door, watched
from mixofshow.federation.bundle import built_app, signed_app
from mixofshow.federation.door import FLEET, NODE_HEADER, open_door
from mixofshow.federation.keys import admit, expel, make_node_key, make_tls, members
from mixofshow.federation.launch import environment, free_port
from mixofshow.reading import parse_table

of_flower = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
"""Its bundling names a pattern of pathspec's by an old name."""


@of_flower
def test_the_shipped_app_is_what_flower_makes_of_its_content_and_the_shipped_key_verifies_it():
    app, verifications = signed_app()
    assert app == built_app()
    trusted = parse_table(bundle.TRUSTED.read_text(), "trusted")
    fab = Fab(hashlib.sha256(app).hexdigest(), app, verifications)
    assert _verify_fab(fab, trusted)
    assert not _verify_fab(Fab(fab.hash_str, app + b"\0", verifications), trusted)
    assert not _verify_fab(Fab(fab.hash_str, app, {"valid_license": "Valid"}), trusted)


@of_flower
def test_another_app_signed_by_another_key_is_not_ours(tmp_path):
    bundle.sign(tmp_path)
    app, trusted = (tmp_path / "app.fab").read_bytes(), parse_table(bundle.TRUSTED.read_text(), "trusted")
    other = json.loads((tmp_path / "signature.json").read_text())
    assert not _verify_fab(Fab("", app, other), trusted)


def test_private_keys_are_for_their_owner_alone(tmp_path):
    make_tls(tmp_path, ["center.example"])
    make_node_key(tmp_path / "key")
    for path in (tmp_path / "tls" / "ca.key", tmp_path / "tls" / "server.key", tmp_path / "key"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_what_clients_trust_stays_when_the_center_is_started_again(tmp_path):
    make_tls(tmp_path, ["center.example"])
    before = (tmp_path / "tls" / "ca.pem").read_bytes()
    make_tls(tmp_path, ["center.example"])
    with pytest.raises(BadInputError, match="other.example"):
        make_tls(tmp_path, ["other.example"])
    (tmp_path / "tls" / "server.pem").unlink()
    make_tls(tmp_path, ["other.example"])
    assert (tmp_path / "tls" / "ca.pem").read_bytes() == before


def test_the_list_of_members_takes_a_key_once_and_a_name_once(tmp_path):
    one, other = make_node_key(tmp_path / "one"), make_node_key(tmp_path / "other")
    assert make_node_key(tmp_path / "one") == one != other
    admit(tmp_path, "one", one)
    admit(tmp_path, "one", one + " a comment")
    for name, line, said in (
        ("one", other, "another key"),
        ("two", one, "that of one already"),
        ("../x", other, "expected a name"),
        ("two", "ssh-ed25519 AAAA", "not a public key"),
        ("two", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGeaNiNUuuY0GduvGdbTMUfPPV/FdWHorslEnYfYSOor", "elliptic curve"),
    ):
        with pytest.raises(BadInputError, match=said):
            admit(tmp_path, name, line)
    assert list(members(tmp_path)) == ["one"]
    expel(tmp_path, "one")
    assert members(tmp_path) == {}
    with pytest.raises(BadInputError, match="no member"):
        expel(tmp_path, "one")


class _SuperLink(BaseHTTPRequestHandler):
    """Answers whatever is asked, as a SuperLink without accounts does."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response({"unsigned": 401, "broken": 500}.get(self.path.rsplit("/", 1)[-1], 200))
        self.end_headers()
        self.wfile.write(self.path.encode() + b" " + body[:10])

    def log_message(self, *args):
        pass


@pytest.fixture
def through_the_door(tmp_path, monkeypatch):
    """A client outside, and what stands before the SuperLink."""
    make_tls(tmp_path, [])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "tls" / "server.pem", tmp_path / "tls" / "server.key")
    server = HTTPServer(("127.0.0.1", 0), _SuperLink)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(door, "MAX_REQUEST", 1000)
    monkeypatch.setattr(door, "QUOTA", 1500)
    port = free_port()
    trust = ssl.create_default_context(cafile=tmp_path / "tls" / "ca.pem")
    inner = f"127.0.0.1:{server.server_port}"
    with open_door(tmp_path, "127.0.0.1", port, inner), httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust) as one:
        yield one
    server.shutdown()
    server.server_close()


def test_the_door_lets_through_what_clients_say_and_nothing_of_operators_or_of_the_centers_own(through_the_door):
    post = through_the_door.post
    assert post(f"{FLEET}pull-messages", content=b"hello").text == f"{FLEET}pull-messages hello"
    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", f"{FLEET}../control/start-run", f"{FLEET}%2e%2e/control/x"):
        assert post(path, content=b"hello").status_code in (404, 405)
    assert through_the_door.get(f"{FLEET}pull-messages").status_code == 405


def test_the_door_takes_no_more_than_its_measure(through_the_door):
    def send(count, node="one", what="push-object"):
        return through_the_door.post(FLEET + what, content=b"x" * count, headers={NODE_HEADER: node}).status_code

    assert send(1001) == 413
    assert [send(900), send(900), send(500), send(200)] == [200, 413, 200, 413]
    assert send(900, "another") == 200
    assert [send(900, "third", "unsigned") for _ in range(3)] == [401] * 3
    assert send(900, "third") == 200


def test_a_fault_of_the_center_is_one_to_ask_again_after(through_the_door):
    assert through_the_door.post(f"{FLEET}broken", content=b"x").status_code == 503


def test_a_locked_database_is_waited_for_longer_than_flower_does(monkeypatch):
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    found = []
    for prepare in (lambda: None, watched.be_patient_with_the_database):
        prepare()
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            sql_mixin._set_sqlite_pragmas(connection, None)
            found += connection.execute("PRAGMA busy_timeout").fetchone()
    assert found == [5000, 120_000]


def test_an_app_gives_up_on_what_never_comes_of_its_message(monkeypatch):
    pull, tries = inflatable_utils.pull_and_inflate_object_from_tree, []
    monkeypatch.setattr(pull, "__kwdefaults__", {**pull.__kwdefaults__, "initial_backoff": 0.0})

    def never(part):
        tries.append(part)
        raise inflatable_utils.ObjectUnavailableError("not here")

    watched.give_up_on_what_never_comes()
    with pytest.raises(inflatable_utils.ObjectPullError):
        pull(ObjectTree(object_id="part"), never, lambda *_: None, return_type=Message)
    assert len(tries) == watched.TRIES


def test_flowers_programs_report_to_nobody_and_look_for_no_newer_version(tmp_path, monkeypatch):
    """Where they look whether they may, also in a shell that has allowed it."""
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "0")
    looks = "update_check._read_flwr_update_check_cache = lambda: print('looks for a newer version')"
    lines = ("from flwr.supercore import telemetry, update_check", looks, "update_check.warn_if_flwr_update_available()")
    code = "\n".join([*lines, "print(telemetry.FLWR_TELEMETRY_ENABLED)"])
    run = [sys.executable, "-c", code]
    said = subprocess.run(run, env=environment(tmp_path), capture_output=True, text=True, check=True).stdout
    assert said == "0\n"


def test_where_a_center_listens_is_told_once_its_door_is_open(tmp_path, monkeypatch):
    told = tmp_path / center.STATE

    @contextlib.contextmanager
    def opened(*_):
        assert not told.exists()
        yield

    for name, stand_in in (("store_app", lambda _: None), ("_wait_for", lambda *_: None), ("open_door", opened)):
        monkeypatch.setattr(center, name, stand_in)
    monkeypatch.setattr(center, "running", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(center, "always_running", lambda *_: contextlib.nullcontext(told.read_text()))
    with center.running_center(tmp_path, "emojiland", hosts=[], host="127.0.0.1", port=1, device="cpu"):
        assert center.state_of(tmp_path).base == "emojiland"


def test_nothing_can_listen_where_something_does(tmp_path):
    make_tls(tmp_path, [])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInputError, match="nothing can listen"), open_door(tmp_path, "127.0.0.1", port, "127.0.0.1:1"):
            pass
