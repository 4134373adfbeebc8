"""The page in a browser: boxes by mouse and keyboard at several sizes, pictures, hostile names, and nothing fetched.

Skipped where there is no Chromium; Debian's package `chromium` is enough.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixofshow.concepts.concept import load_concept
from mixofshow.sampling.pictures import read_picture
from mixofshow.studio.workspace import Workspace
from tests.studio.test_server import free_port

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
    pytest.mark.filterwarnings("default"),  # of the browser's driver
]
EXAMPLES = Path(__file__).parents[2] / "examples" / "concepts"
SECONDS = 120
SCREENSHOTS = os.environ.get("MIXOFSHOW_SCREENSHOTS")
"""A folder for a picture of each tab, where one is asked for."""
EVIL = '<img src=x onerror="window.hurt=1">'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Workspace]]:
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
        page.wait_for_selector(".cards button")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert [url for url in asked if not url.startswith((served[0], "data:", "blob:"))] == []
    assert failed == []


def empty(page: Any, workspace: Workspace) -> None:
    """Take all regions away."""
    while page.locator(".regions [data-act=delete]").count():
        page.locator(".regions [data-act=delete]").first.click()
    until(lambda: "regions" not in canvas(workspace))


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


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """By mouse, between two places given in shares of the canvas."""
    page.locator("#editor svg").scroll_into_view_if_needed()
    box = page.locator("#editor svg").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=4)
    page.mouse.up()


@pytest.mark.parametrize(("width", "height", "size"), [(1280, 800, "160"), (390, 844, "64"), (900, 320, "64")])
def test_boxes_lie_where_they_were_drawn_whatever_the_window(
    open_page: Any, served: tuple[str, Workspace], width: int, height: int, size: str
) -> None:
    page = open_page(width, height)
    page.fill("#width input", size)
    page.press("#width input", "Tab")
    until(lambda: str(canvas(served[1]).get("width")) == size)
    empty(page, served[1])
    page.select_option("[data-grid]", "16")
    for start, end in (((0.07, 0.12), (0.44, 0.88)), ((0.56, 0.13), (0.94, 0.87))):
        page.click("[data-tool=box]")
        drag(page, start, end)
    first, second = regions(served[1], 2)
    assert first["box"] == [0.0625, 0.125, 0.4375, 0.875]
    assert second["box"] == [0.5625, 0.125, 0.9375, 0.875]
    assert first["units"] == "share"
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    page.locator("#editor .region").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    until(lambda: regions(served[1], 2)[0]["box"] == [0.125, 0.125, 0.5, 0.9375])
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    until(lambda: regions(served[1], 2)[0]["box"] == [0.0625, 0.125, 0.4375, 0.875])
    page.locator("#editor .region").nth(1).focus()
    page.keyboard.press("Delete")
    assert regions(served[1], 1) == [first]


def test_polygons_and_painted_masks(open_page: Any, served: tuple[str, Workspace]) -> None:
    page = open_page()
    empty(page, served[1])
    page.select_option("[data-grid]", "4")
    page.click("[data-tool=polygon]")
    for place in ((0.02, 0.02), (0.98, 0.02), (0.5, 0.98)):
        drag(page, place, place)
    page.keyboard.press("Enter")
    assert regions(served[1], 1)[0]["polygon"] == [[0, 0], [1, 0], [0.5, 1]]
    page.click("[data-tool=brush]")
    drag(page, (0.2, 0.5), (0.8, 0.5))
    mask = regions(served[1], 2)[1]["mask"]
    grey = read_picture(mask, "L")
    across = [grey.getpixel((round(x * grey.width), grey.height // 2)) for x in (0.05, 0.3, 0.7, 0.95)]
    assert across == [0, 255, 255, 0]


def test_a_picture_is_composed_drawn_and_brought_back(open_page: Any, served: tuple[str, Workspace], tmp_path: Path) -> None:
    workspace = served[1]
    page = open_page()
    empty(page, workspace)
    page.fill("#width input", "96")
    page.fill("#height input", "32")
    page.fill("#seed input", "3")
    page.press("#seed input", "Tab")
    until(lambda: canvas(workspace).get("seed") == 3)
    page.click(".cards button:has-text('clown')")
    page.click(".cards button:has-text('robot')")
    page.fill("#scene input, #scene textarea", "in the forest")
    page.click("#fill")
    until(lambda: canvas(workspace).get("prompt") == "a photo of a <clown> and a <robot> in the forest")
    assert [one["prompt"] for one in regions(workspace, 2)] == [
        "a photo of a <clown> and a cook in the forest",
        "a photo of a cook and a <robot> in the forest",
    ]
    page.click("#draw")
    until(lambda: page.input_value("#command textarea, #command input"))
    (picture,) = workspace.picture_files()
    command = shlex.split(page.input_value("#command textarea, #command input"))
    again = [sys.executable, "-m", *command[:-1], str(tmp_path / "again.png")]
    subprocess.run(again, check=True, cwd=workspace.folder)
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/compose.png")
    page.locator(".regions [data-act=delete]").first.click()
    regions(workspace, 1)
    page.locator("#strip button.thumbnail-item, #strip .thumbnail-lg, #strip .grid-container button").first.click()
    regions(workspace, 2)
    empty(page, workspace)
    page.set_input_files("#dropped input[type=file]", picture)
    regions(workspace, 2)


def test_strangers_names_are_text(open_page: Any) -> None:
    page = open_page(color_scheme="dark")
    assert EVIL[:20] in page.locator(".cards button").first.get_attribute("title")
    page.click(".cards button >> nth=0")
    page.fill(".regions textarea >> nth=-1", EVIL)
    until(lambda: EVIL[:20] in page.inner_text("#editor"))
    page.wait_for_timeout(1500)
    assert page.evaluate("window.hurt") is None
    assert page.locator("#editor .regions img").count() == 0
