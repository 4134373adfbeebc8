"""A served studio and pages of it in a real Chromium, for the tests that need them.

Skipped where there is no Chromium: `make browser` installs Debian's where it may.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixofshow.concepts.concept import load_concept
from mixofshow.studio.workspace import Workspace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EXAMPLES = Path(__file__).parents[2] / "examples" / "concepts"
SECONDS = 120
SCREENSHOTS = os.environ.get("MIXOFSHOW_SCREENSHOTS")
"""A folder for a picture of each tab, where one is asked for."""
EVIL = '<img src=x onerror="window.hurt=1">'
IN_A_BROWSER = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
    pytest.mark.filterwarnings("default"),  # of the browser's driver
]


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Workspace]]:
    """A studio's address and workspace, with three concepts whose authors are hostile."""
    pytest.importorskip("gradio")
    workspace = Workspace(tmp_path_factory.mktemp("studio"))
    workspace.open()
    for name in ("clown", "steamtrain", "robot"):
        concept = load_concept(EXAMPLES / f"{name}.safetensors")
        info = concept.info.model_copy(update={"author": EVIL, "license": EVIL})
        type(concept)(info, concept.embeddings, concept.deltas).save(workspace.concepts / f"{name}.safetensors")
    port = free_port()
    command = [sys.executable, "-m", "mixofshow", "studio", str(workspace.folder), "--port", str(port)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    line = child.stdout.readline()
    assert line.startswith("http://127.0.0.1"), line
    yield line.split()[0], workspace
    child.terminate()
    child.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, served: tuple[str, Workspace]) -> Iterator[Callable[..., Any]]:
    """`open_page(1280, 800)` is a page that is there; afterwards, nothing was fetched from elsewhere and nothing failed."""
    pages, asked, failed = [], list[str](), list[str]()

    def opened(width: int = 1280, height: int = 800, **options: Any) -> Any:
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(SECONDS * 1000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(served[0])
        page.wait_for_selector("#editor .cards button")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert [url for url in asked if not url.startswith((served[0], "data:", "blob:"))] == []
    assert failed == []


def empty(page: Any, workspace: Workspace) -> None:
    """Take all regions away, and what is started from or followed."""
    if page.locator("#without").is_visible():
        page.click("#without")
    while page.locator("#editor .regions [data-act=delete]").count():
        page.locator("#editor .regions [data-act=delete]").first.click()
    until(lambda: not {"regions", "image", "controls"} & canvas(workspace).keys())


def canvas(workspace: Workspace) -> dict[str, Any]:
    """What is on the canvas, as the workspace has it."""
    return yaml.safe_load(workspace.canvas.read_text("utf-8")) if workspace.canvas.exists() else {}


def until(holds: Callable[[], Any]) -> Any:
    """What it says once it says something."""
    deadline = time.monotonic() + SECONDS
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found
    return found


def regions(workspace: Workspace, count: int) -> list[dict[str, Any]]:
    """So many regions, once they are there."""
    return until(lambda: len(found := canvas(workspace).get("regions", [])) == count and found)


def drag(page: Any, start: tuple[float, float], end: tuple[float, float], editor: str = "#editor") -> None:
    """By mouse, between two places given in shares of the canvas."""
    page.locator(f"{editor} svg").scroll_into_view_if_needed()
    box = page.locator(f"{editor} svg").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=4)
    page.mouse.up()


def fill(page: Any, place: str, value: str) -> None:
    """Type into the field there, whichever kind Gradio makes of it."""
    page.locator(place).locator("input, textarea").first.fill(value)


def shot(page: Any, name: str) -> None:
    """Keep a picture of the page, where that is asked for."""
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png")
