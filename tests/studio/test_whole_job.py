"""The whole job in a browser: pictures dropped, tuned, stopped, resumed, fused, drawn, compared; and who can use the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.studio.workspace import Workspace
from tests.studio.conftest import IN_A_BROWSER, INSIDE, drag, empty, fill, regions, resize, turn_to, until

pytestmark = IN_A_BROWSER
SERIOUS = ("serious", "critical")
NOT_OURS = [[".empty"]]
"""A part of Gradio's that has a label and no role."""


def tuned(page: Any, **settings: str) -> None:
    """Fill in some settings, and start."""
    for name, value in settings.items():
        fill(page, f"#tune-settings .field-{name.replace('_', '-')}", value)
    page.click("#tune")


def masks_painted(page: Any) -> None:
    """A mask for each of two pictures, by one stroke; what is said of the folder is up to date after each."""
    for number, said in enumerate(("no mask in", "2 of 2 pictures have masks")):
        page.click(f"#tune-pictures [data-act=paint] >> nth={number}")
        until(lambda number=number: f"00{number}.png" in page.inner_text("#mask-said"))
        until(lambda: page.locator("#mask-editor .tools").bounding_box()["y"] < page.viewport_size["height"])
        page.click("#save-mask")
        until(lambda: "nothing is painted yet" in page.inner_text("#mask-said"))
        drag(page, (0.3, 0.5), (0.7, 0.5), "#mask-editor")
        assert page.locator("#mask-editor li").count() == 1 and not page.locator("#mask-editor textarea").count()
        page.click("#save-mask")
        until(lambda: "is written" in page.inner_text("#mask-said"))
        until(lambda said=said: said in page.inner_text("#tune-pictures") + page.inner_text("#check-said"))


def test_a_concept_is_tuned_from_dropped_pictures_stopped_resumed_fused_and_drawn(
    open_page: Any, served: tuple[str, Workspace], tmp_path: Path
) -> None:
    workspace = served[1]
    write_concept("foxy", tmp_path / "foxy")
    found = sorted((tmp_path / "foxy" / "train").glob("*.png"))[:2]
    broken = [tmp_path / f"broken-{number}.{('png', 'gif', 'txt')[number % 3]}" for number in range(20)]
    for number, one in enumerate(broken):
        one.write_bytes(found[0].read_bytes()[: 7 * number])
    page = open_page()
    turn_to(page, "Tune")
    fill(page, "#tune-name", "foxy")
    fill(page, "#tune-word", "dog")
    page.set_input_files("#tune-files input[type=file]", [*broken, *found])
    until(lambda: page.locator("#tune-said .line").count() == 20)
    assert all("broken-" in line and "\n" not in line for line in page.locator("#tune-said .line").all_inner_texts())
    assert not page.locator(".toast-body").count()
    until(lambda: page.locator("#tune-pictures img").count() == 2)
    until(lambda: "nothing to say" in page.inner_text("#check-said"))
    page.fill("#tune-pictures textarea >> nth=1", "a <foxy> in the forest")
    caption = workspace.tuning / "foxy" / "pictures" / "001.txt"
    until(lambda: caption.is_file() and caption.read_text() == "a <foxy> in the forest\n")
    masks_painted(page)
    page.click("#tune-settings button")
    tuned(page, steps="4", batch_size="1", preview_every="0")
    concept = workspace.concepts / "foxy.safetensors"
    until(concept.exists)
    until(lambda: "done" in page.inner_text("#tune-status"))
    short = concept.read_bytes()
    tuned(page, steps="24", save_every="5")
    until(lambda: " of 24" in page.inner_text("#tune-status"))
    page.click("#tune-stop")
    until(lambda: "stopped" in page.inner_text("#tune-status"))
    assert concept.read_bytes() == short
    page.click("#tune-resume")
    until(lambda: "done" in page.inner_text("#tune-status") and concept.read_bytes() != short)
    assert page.locator("#curve svg").count() == 1
    page.click("#tune-settings button")
    turn_to(page, "Concepts")
    page.check("#shelf input[type=checkbox][data-word='<foxy>']")
    page.check("#shelf input[type=checkbox][data-word='<clown>']")
    page.fill("#shelf input[type=range][data-word='<clown>']", "0.8")
    assert page.input_value("#shelf input[type=number][data-word='<clown>']") == "0.8"
    page.fill("#shelf input[type=number][data-word='<clown>']", "0.05")
    page.click("#fuse-settings button")
    fill(page, "#fuse-settings .field-method", "average")
    assert page.input_value("#fuse-command textarea") == ""  # no list of strengths is written yet that it could name
    page.click("#fuse")
    command = until(lambda: page.input_value("#fuse-command textarea")).split()
    assert '"unet_alpha": 0.05' in (workspace.folder / command[2]).read_text() and "average" in command
    until(lambda: "done" in page.inner_text("#fuse-status"))
    assert workspace.model_names() == ["fused"]
    page.click("#fuse-settings button")
    turn_to(page, "Compose")
    empty(page, workspace)
    resize(page, workspace, 64, 32)
    page.click("#more button")
    fill(page, "#more .field-steps", "2")
    page.click("#editor .cards button:has-text('foxy')")
    page.click("#editor .cards button:has-text('clown')")
    regions(workspace, 2)
    page.click("#drawn-by input")
    page.click("[role=option]:has-text('fused')")
    page.click("#draw")
    picture = until(workspace.picture_files)[0]
    assert "--model models/fused" in picture.with_suffix(".yaml").read_text("utf-8")
    page.click("#compare")
    until(lambda: page.locator("#beside img").count() == 5)
    assert "weight fusion" in page.inner_text("#beside")


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 800, "light"), (390, 844, "dark")])
def test_everybody_can_use_the_page(
    open_page: Any, served: tuple[str, Workspace], width: int, height: int, scheme: str
) -> None:
    """By axe-core: names for controls, roles, contrast, on every tab."""
    axe = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js")
    page = open_page(width, height, color_scheme=scheme)
    page.add_script_tag(path=axe)
    faults = []
    for tab, inside in INSIDE.items():
        turn_to(page, tab)
        page.wait_for_selector(f"#{inside}")
        found = page.evaluate("exclude => axe.run({exclude}, {resultTypes: ['violations']})", NOT_OURS)
        for one in found["violations"]:
            if one["impact"] in SERIOUS:
                faults += [
                    f"{tab}: {one['id']}: {node['html'][:160]} {node['failureSummary']}" for node in one["nodes"]
                ]
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert faults == []
