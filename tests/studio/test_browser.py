"""The page in a browser: boxes by mouse and keyboard at several sizes, pictures, hostile names, and nothing fetched."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixofshow.sampling.pictures import read_picture
from mixofshow.sampling.replay import composition_of
from mixofshow.studio.workspace import Workspace
from tests.studio.conftest import (
    EVIL,
    IN_A_BROWSER,
    STRANGE,
    canvas,
    drag,
    empty,
    fill,
    regions,
    resize,
    suite_in,
    turn_to,
    until,
)

pytestmark = IN_A_BROWSER


@pytest.mark.parametrize(("width", "height", "size"), [(1280, 800, "160"), (390, 844, "64"), (900, 320, "2048")])
def test_boxes_lie_where_they_were_drawn_whatever_the_window(
    open_page: Any, served: tuple[str, Workspace], width: int, height: int, size: str
) -> None:
    page = open_page(width, height)
    page.fill("#width input", size)
    page.press("#width input", "Tab")
    until(lambda: str(canvas(served[1]).get("width")) == size)
    empty(page, served[1])
    page.select_option("#editor [data-grid]", "16")
    for start, end in (((0.07, 0.12), (0.44, 0.88)), ((0.56, 0.13), (0.94, 0.87))):
        page.click("#editor [data-tool=box]")
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
    page.keyboard.press("Control+z")
    assert regions(served[1], 2) == [first, second]
    for _ in range(2):  # until nothing is left that had the keys
        page.keyboard.press("Control+z")
    until(lambda: not canvas(served[1]).get("regions"))
    page.keyboard.press("Control+Shift+z")
    assert regions(served[1], 1) == [first]


DAB = """([x, y]) => {
  const svg = document.querySelector("#editor svg"), place = svg.getBoundingClientRect();
  const clientX = place.left + x * place.width, clientY = place.top + y * place.height;
  svg.setPointerCapture = () => {};
  for (const kind of ["pointerdown", "pointerup"]) svg.dispatchEvent(new PointerEvent(kind, { clientX, clientY, bubbles: true }));
}"""
"""The brush, for no time."""
TYPE_AND_LEAVE = """text => {
  const field = document.querySelector("#editor .regions textarea"), kept = window.setTimeout;
  field.focus();
  window.setTimeout = () => 1;
  field.value = text;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  window.setTimeout = kept;
  field.blur();
}"""
"""So fast that no time passes that the page would wait for more."""


def test_polygons_and_painted_masks(open_page: Any, served: tuple[str, Workspace]) -> None:
    page = open_page()
    empty(page, served[1])
    for name in ("#width", "#height"):  # another test may have left a strip
        fill(page, name, "128")
    page.press("#height input", "Tab")
    until(lambda: (canvas(served[1]).get("width"), canvas(served[1]).get("height")) == (128, 128))
    page.select_option("#editor [data-grid]", "4")
    page.click("#editor [data-tool=polygon]")
    for place in ((0.02, 0.02), (0.98, 0.02), (0.5, 0.98)):
        drag(page, place, place)
    page.keyboard.press("Enter")
    assert regions(served[1], 1)[0]["polygon"] == [[0, 0], [1, 0], [0.5, 1]]
    page.click("#editor [data-tool=brush]")
    drag(page, (0.2, 0.5), (0.8, 0.5))
    mask = regions(served[1], 2)[1]["mask"]
    grey = read_picture(mask, "L")
    across = [grey.getpixel((round(x * grey.width), grey.height // 2)) for x in (0.05, 0.3, 0.7, 0.95)]
    assert across == [0, 255, 255, 0]
    page.reload()
    page.wait_for_selector("#editor .region >> nth=1")
    page.locator("#editor .regions textarea").nth(1).focus()  # which selects it
    page.click("#editor [data-tool=brush]")
    page.evaluate(DAB, [0.5, 0.1])
    until(lambda: regions(served[1], 2)[1]["mask"] != mask)
    grey = read_picture(regions(served[1], 2)[1]["mask"], "L")
    assert all(grey.getpixel((grey.width // 2, round(y * grey.height))) > 200 for y in (0.1, 0.5))
    page.evaluate(TYPE_AND_LEAVE, "a quick one")
    until(lambda: regions(served[1], 2)[0]["prompt"] == "a quick one")


def picture_after(workspace: Workspace, before: int) -> Path:
    """The newest picture, once there are more than before."""
    return until(lambda: len(found := workspace.picture_files()) > before and found[0])


def test_a_picture_is_composed_drawn_and_brought_back(
    open_page: Any, served: tuple[str, Workspace], tmp_path: Path
) -> None:
    workspace = served[1]
    page = open_page()
    empty(page, workspace)
    page.click("#more button")
    fill(page, "#more .field-steps", "4")
    for name, value in (("#width", "128"), ("#height", "64"), ("#seed", "3")):
        fill(page, name, value)
    page.press("#seed input", "Tab")
    until(lambda: canvas(workspace).get("seed") == 3)
    page.click("#more button")
    page.click("#editor .cards button:has-text('clown')")
    page.click("#editor .cards button:has-text('robot')")
    page.fill("#scene input, #scene textarea", "in the forest")
    page.click("#fill")
    until(lambda: canvas(workspace).get("prompt") == "a photo of a <clown> and a <robot> in the forest")
    assert [one["prompt"] for one in regions(workspace, 2)] == [
        "a photo of a <clown> and a cook in the forest",
        "a photo of a cook and a <robot> in the forest",
    ]
    page.click("#draw")
    picture = picture_after(workspace, 0)
    command = shlex.split(until(lambda: page.input_value("#command textarea, #command input")))
    again = [sys.executable, "-m", *command[:-1], str(tmp_path / "again.png")]
    subprocess.run(again, check=True, cwd=workspace.folder)
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()
    page.wait_for_selector("#editor .canvas img:not([hidden])")
    page.locator("#editor .regions [data-act=delete]").first.click()
    regions(workspace, 1)
    page.locator("#strip button.thumbnail-item, #strip .thumbnail-lg, #strip .grid-container button").first.click()
    regions(workspace, 2)
    page.locator("#editor .regions [data-act=over]").nth(1).click()
    second = picture_after(workspace, 1)
    assert composition_of(second).redo.prompt == "a photo of a cook and a <robot> in the forest"
    left = (0, 0, 64, 64)  # the second region begins behind it
    assert Image.open(second).crop(left).tobytes() == Image.open(picture).crop(left).tobytes()
    empty(page, workspace)
    page.set_input_files("#dropped input[type=file]", picture)
    regions(workspace, 2)


def test_a_picture_follows_a_sketch_from_another(open_page: Any, served: tuple[str, Workspace], tmp_path: Path) -> None:
    workspace = served[1]
    page = open_page()
    empty(page, workspace)
    before = len(workspace.picture_files())
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "start.png")
    page.fill("#prompt textarea", "a photo of a cat")
    page.fill("#width input", "64")
    page.fill("#height input", "64")
    page.press("#height input", "Tab")
    until(lambda: canvas(workspace).get("height") == 64)
    page.click("#given button")
    page.set_input_files("#start input[type=file]", tmp_path / "start.png")
    until(lambda: "Starts from" in page.inner_text("#given-said"))
    # The page may still move under the mouse: again, until there is something on it.
    until(lambda: drag(page, (0.3, 0.5), (0.7, 0.5), "#sketch") or page.locator("#sketch .regions li").count())
    page.click("#follow")
    until(lambda: "Follows a sketch" in page.inner_text("#given-said"))
    page.click("#draw")
    drawn = composition_of(picture_after(workspace, before))
    assert drawn.image and [one.network for one in drawn.controls] == ["emojiland-t2i-adapter"]
    page.click("#without")
    until(lambda: not {"image", "controls"} & canvas(workspace).keys())


def test_what_is_drawn_can_be_cancelled_and_the_page_closed(open_page: Any, served: tuple[str, Workspace]) -> None:
    workspace = served[1]
    page = open_page()
    empty(page, workspace)
    page.fill("#prompt textarea", "a photo of a cat")
    page.click("#more button")
    fill(page, "#more .field-steps", "50")
    fill(page, "#num", "40")
    page.press("#num input", "Tab")
    until(lambda: (canvas(workspace).get("num"), canvas(workspace).get("steps")) == (40, 50))
    page.click("#draw")
    until(lambda: "of 2000" in page.inner_text("#draw-status"))
    page.click("#draw")
    until(lambda: "of 2000" in (said := page.inner_text("#draw-status")) and "1 more of them waits" in said)
    page.close()
    page = open_page()
    until(lambda: "of 2000" in page.inner_text("#draw-status"))
    line = page.locator("#draw-status").bounding_box()
    assert line["y"] + line["height"] < page.viewport_size["height"]  # nobody need scroll to see how far it is
    page.click("#cancel")
    until(lambda: "stopped" in page.inner_text("#draw-status"))
    left = {path.stem for path in workspace.pictures.glob("*.yaml")}
    assert left == {path.stem for path in workspace.picture_files()}


def test_strangers_names_are_text(open_page: Any) -> None:
    page = open_page(390, 844, color_scheme="dark")
    assert EVIL[:20] in page.locator("#editor .cards button").first.get_attribute("title")
    page.click("#editor .cards button >> nth=0")
    page.fill("#editor .regions textarea >> nth=-1", STRANGE)
    until(lambda: EVIL[:20] in page.inner_text("#editor"))
    for tab in ("Compose", "Concepts"):
        turn_to(page, tab)
        page.wait_for_timeout(1000)
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    until(lambda: EVIL in page.inner_text("#shelf"))
    assert "\u202e" not in page.inner_text("#shelf")
    assert page.locator("#editor .regions img, #shelf p img").count() == 0
    turn_to(page, "Tune")
    fill(page, "#tune-name", "strange")
    file = {"name": f"{STRANGE[:80]}.png", "mimeType": "image/png", "buffer": b"<script>window.hurt=1</script>"}
    page.set_input_files("#tune-files input[type=file]", [file])
    until(lambda: page.locator("#tune-said .line").count())
    assert page.locator("#tune-said img, #tune-said script").count() == 0
    assert page.evaluate("window.hurt") is None


def test_boxes_are_drawn_arranged_and_put_in_order_without_a_mouse(
    open_page: Any, served: tuple[str, Workspace]
) -> None:
    page, workspace = open_page(), served[1]
    empty(page, workspace)
    resize(page, workspace, 64, 64)
    page.focus("#editor [data-tool=box]")
    page.keyboard.press("Enter")
    assert regions(workspace, 1)[0]["box"] == [0, 0, 0.5, 1]
    page.fill("#editor [data-ratios]", "1:2:1")
    page.press("#editor [data-do=columns]", "Enter")
    arranged = regions(workspace, 3)
    assert [(one["box"][0], one["box"][2]) for one in arranged] == [(0, 0.25), (0.25, 0.75), (0.75, 1)]
    page.focus("#editor .region >> nth=0")
    page.keyboard.press("]")
    until(lambda: regions(workspace, 3) == [arranged[1], arranged[0], arranged[2]])
    page.keyboard.press("Control+z")
    until(lambda: regions(workspace, 3) == arranged)
    page.keyboard.press("Control+Shift+z")
    until(lambda: regions(workspace, 3)[0] == arranged[1])
    page.fill("#editor [data-ratios]", "1:x")
    page.press("#editor [data-do=columns]", "Enter")
    assert "such as 1:2:1" in page.inner_text("#editor .hint")


def pasted(page: Any, place: str, text: str) -> None:
    """Text that takes the place of a field's in one go, as by the clipboard; then the field is left."""
    page.click(place)
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(text)
    page.keyboard.press("Tab")


def test_two_pages_show_the_same(open_page: Any, served: tuple[str, Workspace]) -> None:
    one, other = open_page(), open_page()
    empty(one, served[1])
    pasted(one, "#prompt textarea", "from the first")
    until(lambda: other.input_value("#prompt textarea") == "from the first")
    other.click("#editor .cards button >> nth=0")
    until(lambda: one.locator("#editor .regions li").count() == 1)
    until(lambda: "another page" in one.inner_text("#compose-said"))
    pasted(one, "#negative textarea, #negative input", "rain")
    until(lambda: canvas(served[1]).get("negative_prompt") == "rain")
    assert len(regions(served[1], 1)) == 1 and canvas(served[1])["prompt"] == "from the first"


def test_what_is_wrong_is_said_beside_what_caused_it(open_page: Any, served: tuple[str, Workspace]) -> None:
    page = open_page()
    empty(page, served[1])
    page.fill("#width input", "-3")
    until(lambda: "width" in page.inner_text("#settings-said"))
    page.fill("#width input", "64")
    until(lambda: not page.locator("#settings-said .line").count())
    page.click("#editor .cards button >> nth=0")
    page.click("#editor .regions summary")
    page.fill("#editor .regions [data-key=weight]", "-1")
    until(lambda: "weight" in page.inner_text("#compose-said"))
    page.fill("#editor .regions [data-key=weight]", "1")
    until(lambda: not page.locator("#compose-said .line").count())


def test_numbers_that_cannot_be_leave_the_page_at_work(open_page: Any, served: tuple[str, Workspace]) -> None:
    page = open_page()
    empty(page, served[1])
    for number in ("1e308", "99999999999999999999"):
        page.fill("#seed input", number)
        until(lambda: "below 2^63" in page.inner_text("#settings-said"))
        page.fill("#seed input", "5")
        until(lambda: canvas(served[1]).get("seed") == 5 and not page.locator("#settings-said .line").count())
    page.click("#editor .cards button >> nth=0")
    before = regions(served[1], 1)[0]["box"]
    for edge in ("99", "100"):
        page.fill("#editor [data-edge='0']", edge)
        assert "Left before Right" in page.inner_text("#editor .hint")
        page.press("#editor [data-edge='0']", "Tab")
        assert page.input_value("#editor [data-edge='0']") == "0"
    page.fill("#editor [data-edge='0']", "-50")
    page.press("#editor [data-edge='0']", "Tab")
    assert page.input_value("#editor [data-edge='0']") == "0" and regions(served[1], 1)[0]["box"] == before


def test_what_was_done_before_the_picture_had_another_size_can_be_undone(
    open_page: Any, served: tuple[str, Workspace]
) -> None:
    page, workspace = open_page(), served[1]
    empty(page, workspace)
    for count in (1, 2):
        page.click(f"#editor .cards button >> nth={count - 1}")
        regions(workspace, count)
    page.fill("#width input", "96")
    page.press("#width input", "Tab")
    until(lambda: "0 0 1000 666" in str(page.get_attribute("#editor svg", "viewBox")))
    for done, button in ((1, "undo"), (0, "undo"), (1, "redo"), (2, "redo")):
        page.click(f"#editor [data-do={button}]")
        until(lambda count=done: len(canvas(workspace).get("regions", [])) == count)
    assert canvas(workspace)["width"] == 96
    page.fill("#width input", "64")
    page.press("#width input", "Tab")
    until(lambda: canvas(workspace)["width"] == 64)


def test_a_study_is_made_answered_and_counted(open_page: Any, served: tuple[str, Workspace]) -> None:
    page, workspace = open_page(), served[1]
    suite_in(workspace)
    turn_to(page, "Measure")
    page.click("#asking button")
    fill(page, "#study-count", "2")
    page.click("#study-make")
    until(lambda: "2 pairs" in page.inner_text("#study-said"))
    words = shlex.split(until(lambda: page.input_value("#study-command textarea")))
    study = workspace.folder / "measured" / "study.html"
    made = study.read_bytes()
    study.unlink()
    subprocess.run([sys.executable, "-m", *words], check=True, cwd=workspace.folder)
    assert study.read_bytes() == made
    page.click("#study-answer")
    inside = page.frame_locator("#measure-page iframe")

    def answers() -> str:
        if inside.locator("#asking").is_visible():
            inside.locator("#left").click()
        return str(inside.locator("#answers").input_value())

    file = {"name": "a.json", "mimeType": "application/json", "buffer": until(answers).encode()}

    def counted() -> int:
        # Again where a busy page takes no notice of the first one.
        if page.locator("#answers input[type=file]").count():
            page.set_input_files("#answers input[type=file]", [file])
        page.wait_for_timeout(5000)
        return int(page.get_by_text("50.0%").count())

    until(counted)
