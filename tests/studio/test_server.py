"""The studio's server: one page, drawn on through Gradio's client, that lets in only whom it should and fetches nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.errors import SettingsError
from mixofshow.studio import compose, tuning
from mixofshow.studio.compose import Studio
from mixofshow.studio.drawing import OWN
from mixofshow.studio.forms import values_of
from mixofshow.studio.workspace import Workspace
from tests.studio.conftest import free_port

pytest.importorskip("gradio")
pytestmark = pytest.mark.filterwarnings("default")  # the client's own are no errors of ours

CLOWN = Path(__file__).parents[2] / "examples" / "concepts" / "clown.safetensors"


@pytest.fixture(scope="module")
def open_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`open_studio("--token", …)` serves a new workspace in a process of its own; returns its address and workspace."""
    running = []

    def opened(*options: str) -> tuple[str, Workspace]:
        folder, port = tmp_path_factory.mktemp("studio"), free_port()
        # So that the workspace is in no folder for temporary files, of which all would be served; and a proxy that
        # leads nowhere, by which no studio may ask for itself.
        elsewhere = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("tmp")), "HTTP_PROXY": "http://127.0.0.1:9"}
        command = [sys.executable, "-m", "mixofshow", "studio", str(folder), "--concept", str(CLOWN)]
        child = subprocess.Popen(
            [*command, "--port", str(port), *options], stdout=subprocess.PIPE, text=True, env=elsewhere
        )
        running.append(child)
        assert child.stdout
        line = child.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}/ "), line
        return line.split()[0], Workspace(folder)

    yield opened
    for child in running:
        child.terminate()
    for child in running:
        child.communicate(timeout=90)


@pytest.fixture(scope="module")
def address_and_workspace(open_studio: Any) -> tuple[str, Workspace]:
    return open_studio()


def test_a_picture_is_drawn_through_the_page(address_and_workspace: tuple[str, Workspace]) -> None:
    from gradio_client import Client

    address, workspace = address_and_workspace
    client = Client(address, verbose=False)
    canvas = {"regions": [{"prompt": "a <clown>", "box": [0, 0, 1, 1], "units": "share"}]}
    more = values_of(compose.more_fields(), {"steps": 1})
    said = client.predict(canvas, "a <clown>", "", 32, 32, 7, 1, *more, OWN, api_name="/draw")
    assert "drawing 1 picture" in said
    deadline = time.monotonic() + 60
    while not workspace.picture_files() and time.monotonic() < deadline:
        time.sleep(0.1)
    (picture,) = workspace.picture_files()
    assert compose.recalled(workspace, picture).seed == 7
    assert compose.recalled(workspace, picture).steps == 1
    refused = client.predict(canvas, "<b>bold</b>", "", 33, 32, 7, 1, *more, OWN, api_name="/draw")
    assert "unknown concept &#x27;&lt;b&gt;&#x27;" in refused
    client.close()


def test_only_this_machines_names_lead_to_it(address_and_workspace: tuple[str, Workspace]) -> None:
    import httpx

    address, _ = address_and_workspace
    assert httpx.get(address).status_code == 200
    assert httpx.get(address, headers={"host": "rebound.example"}).status_code == 400
    for path in ("docs", "openapi.json", "monitoring"):
        assert httpx.get(address + path).status_code >= 400


def test_only_what_the_page_shows_is_served(address_and_workspace: tuple[str, Workspace]) -> None:
    import httpx

    address, workspace = address_and_workspace
    inside, outside = workspace.folder / "mine.txt", workspace.folder.parent / "secret.txt"
    for path in (inside, outside):
        path.write_text("secret")
    for path in (inside, outside, inside.parent / ".." / "secret.txt", *workspace.concept_files(), "/etc/hostname"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_the_page_names_nothing_to_fetch_from_elsewhere(address_and_workspace: tuple[str, Workspace]) -> None:
    import httpx

    config = httpx.get(f"{address_and_workspace[0]}config").json()
    assert config["analytics_enabled"] is False and config["run_history"] is False
    theme = httpx.get(f"{address_and_workspace[0]}theme.css").text
    assert "fonts.googleapis" not in theme and "@import" not in theme


def test_nothing_that_a_page_asks_waits_in_the_queue_that_may_forget_it(
    address_and_workspace: tuple[str, Workspace],
) -> None:
    import httpx

    asked = httpx.get(f"{address_and_workspace[0]}config").json()["dependencies"]
    assert asked and not [one["id"] for one in asked if one["backend_fn"] and one["queue"]]


def test_with_a_token_nobody_comes_in_without(open_studio: Any) -> None:
    import httpx

    address, _ = open_studio("--token", "open sesame")
    assert httpx.post(f"{address}gradio_api/upload", files={"files": b"x"}).status_code == 401
    assert httpx.get(f"{address}config").status_code == 401
    with httpx.Client() as visitor:
        wrong = visitor.post(f"{address}login", data={"username": "me", "password": "open sesam"})
        assert wrong.status_code == 400
        assert visitor.post(f"{address}login", data={"username": "me", "password": "open sesame"}).status_code == 200
        assert visitor.get(f"{address}config").status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "localhost", "::1"])
def test_whoever_asks_at_the_address_that_was_given_is_answered(host: str) -> None:
    """At any but two of this machine's own the page was refused."""
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from mixofshow.studio.server import _launching

    only_here = _launching(host, 7860, None)["app_kwargs"]["middleware"]
    client = TestClient(Starlette(routes=[Route("/", lambda _: Response())], middleware=only_here))
    shown = f"[{host}]" if ":" in host else host
    assert client.get("/", headers={"host": f"{shown}:7860"}).status_code == 200
    assert client.get("/", headers={"host": "rebound.example:7860"}).status_code == 400


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixofshow.studio import server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match="give another port"):
            server.check_port("127.0.0.1", taken.getsockname()[1])


def test_ctrl_c_is_that_of_any_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mixofshow", "studio", str(tmp_path / "studio"), "--port", str(free_port())]
    (elsewhere := tmp_path / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(elsewhere)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdout and "Ctrl-C ends it" in child.stdout.readline()
        assert list(elsewhere.glob("mixofshow-studio-*"))  # where what is dropped lies meanwhile
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=90)
        assert not list(elsewhere.glob("mixofshow-studio-*"))
        assert child.returncode == 130 and "Traceback" not in "".join(said), said


def test_a_server_that_is_killed_in_the_middle_of_tuning_loses_little(tmp_path: Path) -> None:
    from gradio_client import Client

    workspace, port = Workspace(tmp_path / "work"), free_port()
    write_concept("foxy", tmp_path / "foxy")
    tuning.add_pictures(workspace, "foxy", sorted((tmp_path / "foxy" / "train").glob("*.png"))[:2])
    command = [sys.executable, "-m", "mixofshow", "studio", str(workspace.folder), "--port", str(port)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    client = Client(child.stdout.readline().split()[0], verbose=False)
    given = {"steps": 12, "batch_size": 1, "save_every": 2, "preview_every": 0, "tracker": "none"}
    values = values_of(tuning.tuning_fields("emojiland"), given)
    client.predict("foxy", "dog", *values, api_name="/tune")
    place = workspace.concepts / "foxy" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(place.glob("step-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    child.kill()
    child.communicate(timeout=60)
    client.close()
    again = Studio(workspace)
    assert tuning.names(workspace) == ["foxy"] and tuning.known(workspace, "foxy")["steps"] == 12
    assert "Resume goes on" in tuning.broken_off(workspace, "foxy")
    job = again.jobs.wait(tuning.start_tuning(again, "foxy", "dog", given, resume=True))
    assert job.state == "done" and job.curve[0][0] > 2, job.line
    assert tuning.broken_off(workspace, "foxy") == ""
