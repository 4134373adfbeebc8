"""A served studio and pages of it in a real Chromium, for the tests that need them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mixofshow.concepts.concept import load_concept
from mixofshow.studio.workspace import Workspace
from tests.conftest import CHROMIUM

EXAMPLES = Path(__file__).parents[2] / "examples" / "concepts"
SECONDS = 120
EVIL = '<img src=x onerror="window.hurt=1">'
STRANGE = f"{EVIL} \u202egnp.exe مرحبا 😀👩‍👩‍👧 {'long' * 40}"
"""What strangers call things: HTML, turned around, from right to left, pictures, without an end."""
INSIDE = {"Compose": "editor", "Concepts": "shelf li", "Tune": "tune", "Measure": "measure-start"}
"""What each tab shows when it is there."""
IN_A_BROWSER = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),  # before a studio is served
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
        info = concept.info.model_copy(update={"author": STRANGE, "license": EVIL})
        type(concept)(info, concept.embeddings, concept.deltas).save(workspace.concepts / f"{name}.safetensors")
    with serving(workspace) as address:
        yield address, workspace


@contextlib.contextmanager
def serving(workspace: Workspace, *options: str) -> Iterator[str]:
    """Inside, a studio in a process of its own, at this address."""
    command = [sys.executable, "-m", "mixofshow", "studio", str(workspace.folder), "--port", str(free_port()), *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    line = child.stdout.readline()
    assert line.startswith("http://127.0.0.1"), line
    yield line.split()[0]
    child.terminate()
    child.communicate(timeout=90)


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
    for page in (one for one in pages if not one.is_closed()):  # pytest shows what they say where a test failed
        print(f"{page.url} says:", *page.locator(".line:visible").all_inner_texts(), sep="\n  ")
        page.close()
    assert [url for url in asked if not url.startswith((served[0], "data:", "blob:", "about:"))] == []
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


def until(holds: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What it says once it says something."""
    deadline = time.monotonic() + seconds
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


def turn_to(page: Any, tab: str) -> None:
    """Open one of the tabs; what a narrow window has no room for is in a menu."""
    found = page.get_by_role("tab", name=tab)
    if not found.count():
        page.locator(".overflow-menu > button").click()
        found = page.locator(".overflow-dropdown button", has_text=tab)
    found.first.click()


def fill(page: Any, place: str, value: str) -> None:
    """Type into the field there, whichever kind Gradio makes of it."""
    page.locator(place).locator("input, textarea").first.fill(value)


def resize(page: Any, workspace: Workspace, width: int, height: int) -> None:
    """Give the picture another size, once the workspace has it."""
    fill(page, "#width", str(width))
    fill(page, "#height", str(height))
    page.press("#height input", "Tab")
    until(lambda: canvas(workspace).get("height") == height)


def suite_in(workspace: Workspace, hostile: str = "") -> None:
    """What measuring leaves in the workspace, of two methods with two pictures each."""
    folder = workspace.folder / "measured" / "results"
    (folder / "clown").mkdir(parents=True)
    Image.new("RGB", (16, 16), "blue").save(folder / "clown" / "0.png")
    methods = {}
    for method, colour in (("gradient", "green"), ("average", "red")):
        names = [f"{method}-{number}.png" for number in range(2)]
        for name in names:
            Image.new("RGB", (16, 16), colour).save(folder / name)
        row = {"clown": [{"prompt": f"a cook{hostile}", "pictures": names}]}
        methods[method] = {"single": row, "fused": row}
    (folder / "pictures.json").write_text(json.dumps({"references": {"clown": "clown"}, "methods": methods}))
    (folder / "results.json").write_text("{}")
