"""Pictures of every tab with something in it: light, dark, and on a phone. `make screenshots` takes them; no test needs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.studio.workspace import Workspace
from tests.studio.conftest import EXAMPLES, IN_A_BROWSER, canvas, fill, regions, serving, turn_to, until

PLACE: Final = os.environ.get("MIXOFSHOW_SCREENSHOTS")
pytestmark = [*IN_A_BROWSER, pytest.mark.skipif(PLACE is None, reason="no screenshots are asked for")]
RESULTS: Final = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-24-table1.json"
LOOKS: Final = {
    "": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "-dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
    "-phone-dark": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}
"""What is behind a picture's name, and the window it is taken in."""
FILES: Final = {"Compose": "studio", "Concepts": "studio-concepts", "Tune": "studio-tune", "Measure": "studio-measure"}
WAIT: Final = 1800
"""Seconds for what is worked out, which on a busy machine takes its time."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Workspace]]:
    """A studio with the example concepts as they are, whose authors are no strangers."""
    workspace = Workspace(tmp_path_factory.mktemp("studio"))
    with serving(workspace, *(f"--concept={one}" for one in sorted(EXAMPLES.glob("*.safetensors")))) as address:
        yield address, workspace


def test_every_tab_is_pictured(open_page: Any, browser: Any, served: tuple[str, Workspace], tmp_path: Path) -> None:
    assert PLACE
    Path(PLACE).mkdir(parents=True, exist_ok=True)
    page = open_page(1280, 800)
    _fused(page)
    _tuned(page, tmp_path)
    _drawn(page, served[1])
    for look, how in LOOKS.items():
        page = browser.new_page(**how)
        page.set_default_timeout(WAIT * 1000)
        page.goto(served[0])
        for tab, name in FILES.items():
            _shown(page, tab)
            page.screenshot(path=f"{PLACE}/{name}{look}.png", full_page=bool(look))
        page.close()


def _fused(page: Any) -> None:
    turn_to(page, "Concepts")
    page.click("#portraits")
    until(lambda: "portraits: done" in page.inner_text("#take-said"), WAIT)
    for word in ("<clown>", "<robot>"):
        page.check(f"#shelf input[type=checkbox][data-word='{word}']")
    page.click("#fuse")
    until(lambda: "done" in page.inner_text("#fuse-status"), WAIT)


def _tuned(page: Any, tmp_path: Path) -> None:
    turn_to(page, "Tune")
    write_concept("foxy", tmp_path / "foxy")
    fill(page, "#tune-name", "foxy")
    fill(page, "#tune-word", "dog")
    page.set_input_files("#tune-files input[type=file]", sorted((tmp_path / "foxy" / "train").glob("*.png"))[:6])
    until(lambda: page.locator("#tune-pictures img").count() == 6)
    page.fill("#tune-pictures textarea >> nth=0", "a photo of a <foxy> in the forest")
    page.click("#tune-settings button")
    for name, value in {"steps": "60", "batch-size": "4", "preview-every": "30"}.items():
        fill(page, f"#tune-settings .field-{name}", value)
    page.click("#tune")
    until(lambda: "done" in page.inner_text("#tune-status"), WAIT)


def _drawn(page: Any, workspace: Workspace) -> None:
    turn_to(page, "Compose")
    for name, value in (("#width", "128"), ("#height", "64"), ("#seed", "3")):
        fill(page, name, value)
    page.press("#seed input", "Tab")
    until(lambda: canvas(workspace).get("seed") == 3)
    for word in ("clown", "robot"):
        page.click(f"#editor .cards button:has-text('{word}')")
    regions(workspace, 2)
    page.fill("#scene input, #scene textarea", "in the forest")
    page.click("#fill")
    until(lambda: "forest" in canvas(workspace).get("prompt", ""))
    page.click("#draw")
    until(workspace.picture_files, WAIT)


def _shown(page: Any, tab: str) -> None:
    """The tab, with something in it."""
    if tab == "Compose":
        page.locator("#strip .grid-container button").first.click()
        page.wait_for_selector("#editor .canvas img:not([hidden])")
    else:
        turn_to(page, tab)
    if tab == "Concepts":
        page.check("#shelf input[type=checkbox] >> nth=0")
        page.wait_for_selector("#kept table")
    if tab == "Tune":
        fill(page, "#tune-name", "foxy")
        page.locator("#tune-name").locator("input, textarea").first.press("Tab")
        until(lambda: page.locator("#tune-pictures img").count() == 6)
    if tab == "Measure":
        page.set_input_files("#results input[type=file]", RESULTS)
        until(lambda: page.get_by_text("Who is taken for whom").is_visible())
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1500)
