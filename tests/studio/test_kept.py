"""Nothing is lost or falsified: what people put into the workspace, runs that break off, clicks that come twice."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixofshow.concepts.concept import load_concept
from mixofshow.errors import BadInputError, MixOfShowError, SettingsError
from mixofshow.reading import read_table
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.pictures import embedded
from mixofshow.sampling.settings import Composition
from mixofshow.studio import compose, fusing, measuring, shelf, tuning
from mixofshow.studio.compose import Studio
from mixofshow.studio.drawing import OWN
from mixofshow.studio.editor import cards_for
from mixofshow.studio.forms import component
from mixofshow.studio.jobs import Job, Jobs, in_time, noticed
from mixofshow.studio.tuning import tuning_fields
from mixofshow.studio.workspace import LONG, Workspace
from tests.studio.conftest import suite_in

CLOWN = Path(__file__).parents[2] / "examples" / "concepts" / "clown.safetensors"


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    workspace = Workspace(tmp_path / "work")
    shelf.put_on(workspace, [CLOWN])
    return Studio(workspace)


@pytest.fixture
def pictures(studio: Studio) -> Path:
    """The folder of a concept's pictures, two of them."""
    folder = studio.workspace.tuning / "foxy" / "pictures"
    folder.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 80, 70)).save(folder / f"{number:03d}.png")
    return folder


# What people put there themselves.


def test_a_workspace_full_of_photographs_is_shown_and_left_as_it_is(studio: Studio) -> None:
    place = studio.workspace.pictures
    for name in ("holiday.png", "0001.png", "\u202egnp.evil.png", "😀" * 40 + ".png"):
        Image.new("RGB", (8, 8), "green").save(place / name)
    (place / "0002.png").write_bytes(b"no picture")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    said = [compose.caption(path) for path in studio.workspace.picture_files()]
    assert len(said) == 5 and not any("seed" in one for one in said)
    assert not any("\u202e" in one for one in said)
    for path in studio.workspace.picture_files():
        assert compose.picture_captioned(studio, compose.caption(path)) == path
        with pytest.raises(MixOfShowError):
            compose.recalled(studio.workspace, path)
    (new,) = studio.workspace.new_pictures([Composition(prompt="a")], lambda *_: "how")
    assert new.name == "0003.yaml"
    assert {name: (place / name).read_bytes() for name in before} == before


def test_pictures_that_cannot_be_read_break_no_page(studio: Studio) -> None:
    workspace = studio.workspace
    for name in ("concepts/clown.png", "pictures/0001.png"):
        (workspace.folder / name).write_bytes(b"no picture")
    assert [card["picture"] for card in cards_for(shelf.cards(workspace))] == [""]
    assert compose.underlay(workspace.pictures / "0001.png") == ""
    workspace.canvas.write_text("prompt: a\nimage: data:image/png;base64,xxxx\n")
    assert compose.underlay(None, workspace.composition()) == ""


def test_a_mask_as_a_browser_writes_it_is_kept_once(studio: Studio) -> None:
    """Of one that is large as it comes and as it is written, and of one that is large only as it comes."""
    for shape in ((128, 128), (64, 64)):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        text = embedded(Image.merge("RGBA", [noise] * 4))
        assert len(text) > LONG
        mask = {"prompt": "a", "mask": text}
        composition = make_composition({"prompt": "a", "regions": [mask]})
        before = studio.changes.count
        for _ in range(3):
            compose.keep(studio, composition, OWN)
        assert studio.changes.count == before + 1


def test_many_painted_masks_are_read_back_and_each_is_looked_at_once(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None was large enough for a file, and all of them were more than a YAML may have: the canvas was put aside."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64), dtype=np.uint8)
    masks = [{"prompt": "a", "mask": embedded(Image.fromarray(one))} for one in noise]
    assert all(len(one["mask"]) < LONG for one in masks)
    made = make_composition({"prompt": "a", "regions": masks})
    compose.keep(studio, made, OWN)
    assert studio.workspace.composition() == made
    monkeypatch.setattr("mixofshow.studio.workspace.read_picture", lambda *_: pytest.fail("looked at it again"))
    monkeypatch.setattr(Workspace, "composition", lambda _: pytest.fail("read it again"))
    for _ in range(2):
        compose.keep(studio, made.model_copy(update={"prompt": "b"}), OWN)
    assert studio.changes.count == 2 and read_table(studio.workspace.canvas)["prompt"] == "b"


def test_what_could_not_be_read_again_is_not_written(studio: Studio) -> None:
    compose.keep(studio, Composition(prompt="a"), OWN)
    with pytest.raises(SettingsError, match="shorten its prompts"):
        compose.keep(studio, Composition(prompt="a" * 100_000), OWN)
    assert studio.workspace.composition().prompt == "a"


def test_pictures_can_be_drawn_where_their_folder_was_removed(studio: Studio) -> None:
    studio.workspace.pictures.rmdir()
    (new,) = studio.workspace.new_pictures([Composition(prompt="a")], lambda *_: "how")
    assert new.name == "0001.yaml"


def test_whoever_drops_pictures_first_is_asked_for_a_name(studio: Studio) -> None:
    with pytest.raises(SettingsError, match="give it one first"):
        tuning.add_pictures(studio.workspace, "", [])


def test_pictures_of_all_kinds_that_tuning_reads_are_shown(studio: Studio, pictures: Path) -> None:
    for name in ("IMG_1.JPG", "b.jpeg", "c.webp"):
        Image.new("RGB", (64, 64)).save(pictures / name)
    (pictures / "broken.png").write_bytes(b"no picture")
    found = tuning.grid(studio.workspace, "foxy")
    assert {one["name"] for one in found} == {"000.png", "001.png", "IMG_1.JPG", "b.jpeg", "c.webp", "broken.png"}
    assert [one["name"] for one in found if not one["picture"]] == ["broken.png"]


def test_captions_that_people_wrote_stay_as_they_wrote_them(studio: Studio, pictures: Path) -> None:
    workspace = studio.workspace
    (pictures / "000.txt").write_text("a <foxy>\n  here\n")
    (pictures / "001.caption").write_text("by kohya\n")
    shown = tuning.captions(workspace, "foxy")
    assert shown == [["000.png", "a <foxy>\n  here"], ["001.png", "by kohya"]]
    assert tuning.write_captions(workspace, "foxy", shown) == 2
    assert (pictures / "000.txt").read_text() == "a <foxy>\n  here\n" and not (pictures / "001.txt").exists()
    tuning.write_captions(workspace, "foxy", [["001.png", "mine"]])
    assert tuning.captions(workspace, "foxy")[1] == ["001.png", "mine"]
    assert (pictures / "001.caption").read_text() == "by kohya\n"


def test_what_check_says_stands_beside_its_picture(studio: Studio, pictures: Path) -> None:
    (pictures / "cut.png").write_bytes((pictures / "000.png").read_bytes()[:60])
    (pictures / "lone.gif").write_bytes(b"GIF89a")
    found = tuning.findings(studio.workspace, "foxy", "dog")
    said = {one["name"]: one["said"] for one in tuning.grid(studio.workspace, "foxy", found)}
    assert said["000.png"] == [] and said["cut.png"][0].startswith("error: ")
    (general,) = tuning.general(studio.workspace, "foxy", found)
    assert "lone.gif" in general
    assert tuning.general(studio.workspace, "foxy", []) == ["nothing to say: every picture is used as it is"]


def test_a_picture_that_is_taken_away_is_put_aside_with_its_caption_and_mask(studio: Studio, pictures: Path) -> None:
    workspace = studio.workspace
    tuning.write_captions(workspace, "foxy", [["000.png", "a <foxy>"]])
    white = {"regions": [{"mask": embedded(Image.new("L", (8, 8), 255))}]}
    tuning.write_mask(workspace, "foxy", "000.png", white)
    assert [one["masked"] for one in tuning.grid(workspace, "foxy")] == [True, False]
    before = (pictures / "000.png").read_bytes()
    tuning.remove_picture(workspace, "foxy", "000.png")
    aside = workspace.folder / "removed" / "foxy-000"
    assert (aside / "pictures" / "000.png").read_bytes() == before
    assert (aside / "pictures" / "000.txt").is_file() and (aside / "masks" / "000.png").is_file()
    assert [one.name for one in pictures.iterdir()] == ["001.png"]
    with pytest.raises(SettingsError, match="no picture of <foxy>"):
        tuning.remove_picture(workspace, "foxy", "../../../composition.yaml")


def test_a_concept_of_the_same_name_takes_no_concepts_place(
    studio: Studio, pictures: Path, runs: list[Any], tmp_path: Path
) -> None:
    """Neither one that is dropped nor one that is tuned: the one before is in the folder `removed`, with its portrait."""
    workspace, clown = studio.workspace, load_concept(CLOWN)
    mine = (workspace.concepts / "clown.safetensors").read_bytes()
    (workspace.concepts / "clown.png").write_bytes(b"portrait")
    other = dataclasses.replace(clown, info=clown.info.model_copy(update={"author": "somebody"}))
    other.save(tmp_path / "clown.safetensors")
    with noticed(said := []):
        shelf.taken_in(workspace, tmp_path / "clown.safetensors", "clown.safetensors", {})
    assert (workspace.folder / "removed" / "clown.safetensors").read_bytes() == mine
    assert (workspace.folder / "removed" / "clown.png").is_file() and not (workspace.concepts / "clown.png").exists()
    assert "<clown> was there before; that one is removed/clown.safetensors now" in said
    theirs = (workspace.concepts / "clown.safetensors").read_bytes()
    shelf.taken_in(workspace, tmp_path / "clown.safetensors", "clown.safetensors", {})  # the same again
    assert len(list((workspace.folder / "removed").iterdir())) == 2
    shutil.copytree(pictures.parent, workspace.tuning / "clown")
    for resume in (False, True):
        tuned = dataclasses.replace(clown, info=clown.info.model_copy(update={"author": f"resumed: {resume}"}))
        runs.append(tuned.save)
        job = studio.jobs.wait(tuning.start_tuning(studio, "clown", "cook", {}, resume=resume))
        assert job.state == "done", job.line
    assert (workspace.folder / "removed" / "clown-2.safetensors").read_bytes() == theirs
    assert len(list((workspace.folder / "removed").iterdir())) == 3  # what is resumed goes on, and replaces nothing


def test_what_people_put_beside_a_picture_is_no_composition_of_ours(studio: Studio) -> None:
    """A list in another encoding ended all that the page looks at, each second."""
    (studio.workspace.pictures / "holiday.yaml").write_bytes("café".encode("latin-1"))
    assert compose.command_of(studio.workspace.pictures / "holiday.png") == ""


def test_a_workspace_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(MixOfShowError) as refused:
            Workspace(place).open()
        assert "file" in str(refused.value) and "\n" not in str(refused.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_workspace_that_vanishes_breaks_no_page_and_comes_back(studio: Studio) -> None:
    shutil.rmtree(studio.workspace.folder)
    assert shelf.cards(studio.workspace) == [] and studio.workspace.picture_files() == []
    assert tuning.names(studio.workspace) == [] and tuning.previews(studio.workspace, "foxy") == []
    compose.keep(studio, Composition(prompt="a"), OWN)
    assert studio.workspace.composition().prompt == "a"


def test_a_concept_file_that_goes_while_the_shelf_is_read_breaks_nothing(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = studio.workspace.concepts / "gone.safetensors"
    monkeypatch.setattr(Workspace, "concept_files", lambda self: [CLOWN, gone])
    assert [card.name for card in shelf.cards(studio.workspace)] == ["clown"]
    assert len(shelf.unreadable(studio.workspace)) == 1


# Runs that break off, and clicks that come twice.


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What tuning is asked for, in its place; `runs` may hold an exception for the next, or what it does with its target."""
    asked: list[Any] = []

    def tune_into(target: Path, settings: Any, *_: Any, **how: Any) -> None:
        given = asked.pop() if asked and not isinstance(asked[-1], tuple) else None
        asked.append((settings, how))
        if isinstance(given, BaseException):
            raise given
        if given:
            given(target)
        while settings.steps == 77 and not how["progress"](1, 2, {}):
            threading.Event().wait(0.01)

    monkeypatch.setattr(tuning, "tune_into", tune_into)
    monkeypatch.setattr(tuning, "load_base", lambda *_, **__: None)
    return asked


def test_a_run_that_cannot_be_resumed_keeps_the_settings_it_had(
    studio: Studio, pictures: Path, runs: list[Any]
) -> None:
    assert studio.jobs.wait(tuning.start_tuning(studio, "foxy", "dog", {"steps": 9}, resume=False)).state == "done"
    runs.append(SettingsError("cannot be resumed, it is of another run"))
    job = studio.jobs.wait(tuning.start_tuning(studio, "foxy", "cat", {"steps": 5}, resume=True))
    assert job.state == "failed" and "another run" in job.line
    assert {"steps": 9, "class_word": "dog"}.items() <= tuning.known(studio.workspace, "foxy").items()
    job = studio.jobs.wait(tuning.start_tuning(studio, "foxy", "dog", {"steps": 12}, resume=True))
    assert tuning.known(studio.workspace, "foxy")["steps"] == 12 and runs[-1][1]["resume"]


def test_a_concept_is_tuned_once_at_a_time_and_its_running_run_stays_where_it_is(
    studio: Studio, pictures: Path, runs: list[Any]
) -> None:
    first = tuning.start_tuning(studio, "foxy", "dog", {"steps": 77}, resume=False)
    place = studio.workspace.concepts / "foxy" / "checkpoints"
    place.mkdir(parents=True)
    (place / "step-00000001.pt").touch()
    with pytest.raises(SettingsError, match="is being tuned, or waits"):
        tuning.start_tuning(studio, "foxy", "dog", {"steps": 77}, resume=False)
    assert place.is_dir()
    studio.jobs.close(60)
    assert first.state == "stopped"
    tuning.start_tuning(studio, "foxy", "dog", {"steps": 5}, resume=False)
    assert (studio.workspace.folder / "removed" / "foxy").is_dir()


def test_settings_that_people_wrote_are_not_written_over(studio: Studio, pictures: Path, runs: list[Any]) -> None:
    mine = "# mine\nname: foxy\nclass_word: dog\ndata: pictures\n"
    tuning.settings_file(studio.workspace, "foxy").write_text(mine)
    with pytest.raises(BadInputError, match=r"tune\.yaml"):
        tuning.start_tuning(studio, "foxy", "dog", {}, resume=False)
    assert tuning.settings_file(studio.workspace, "foxy").read_text() == mine


def test_checkpoints_come_often_enough_that_little_is_lost() -> None:
    assert {one.key: one.default for one in tuning_fields("emojiland")}["save_every"] == 50


def test_when_the_studio_ends_what_is_at_work_keeps_what_it_has() -> None:
    jobs, kept, begun = Jobs(), list[str](), threading.Event()

    def work(job: Job) -> list[Path]:
        begun.set()
        try:
            while True:
                job.progress(1, 2, {})
        finally:
            threading.Event().wait(0.2)
            kept.append("kept")

    first, second = jobs.submit("a", "one", work), jobs.submit("b", "two", work)
    begun.wait(30)
    assert (jobs.waiting("b"), jobs.waiting("a")) == (1, 0)
    jobs.close(30)
    assert kept == ["kept"] and (first.state, second.state) == ("stopped", "stopped")


@pytest.mark.parametrize(("seconds", "said"), [(5, "5 s"), (99, "99 s"), (509, "8 min"), (7300, "2.0 h")])
def test_how_long_it_takes_is_said_as_people_say_it(seconds: float, said: str) -> None:
    assert in_time(seconds) == said


# Strengths, forms.


@pytest.mark.parametrize("strength", [-0.1, 100.5, math.nan, math.inf, "1", None])
def test_a_strength_that_no_list_may_hold_is_refused_at_once(strength: Any) -> None:
    with pytest.raises(SettingsError, match="<clown>: expected how strong it is, from 0 to 100"):
        fusing.strengths_of({"<clown>": strength})


def test_a_concept_may_be_as_weak_as_anybody_likes(studio: Studio) -> None:
    _, listed = fusing.sources(studio.workspace, fusing.strengths_of({"<clown>": 0.03}))
    assert json.loads(listed)[0]["unet_alpha"] == 0.03
    assert "<clown1> <clown2>" in shelf.cards(studio.workspace)[0].facts


def test_defaults_are_shown_as_one_would_type_them() -> None:
    pytest.importorskip("gradio")
    shown = {one.key: component(one).placeholder for one in fusing.fusion_fields() if one.kind in ("list", "whole")}
    assert shown["picture_prompts"].startswith("default: photo of a {} | ")
    isolate = next(one for one in compose.more_fields() if one.key == "isolate")
    assert component(isolate).placeholder == "default: false"


# Studies.


def test_a_study_is_made_of_what_was_measured_and_shown_apart_from_the_page(studio: Studio) -> None:
    workspace = studio.workspace
    with pytest.raises(SettingsError, match="nothing is measured yet"):
        measuring.make_study(workspace, 2)
    suite_in(workspace, hostile="</iframe><img src=x>\"'")
    assert measuring.make_study(workspace, 2) == 2
    shown = measuring.inside(measuring.study_page(workspace), answering=True)
    assert shown.count("<") == 2 and shown.count('"') == 8  # the frame's own, whatever the page holds
    assert 'sandbox="allow-scripts allow-downloads"' in shown
    assert "allow-same-origin" not in shown and 'sandbox=""' in measuring.inside(measuring.study_page(workspace))
    with pytest.raises(BadInputError, match="40 are asked for"):
        measuring.make_study(workspace, 40)
    (workspace.folder / "measured" / "study.html").write_text("<p>mine</p>")
    assert measuring.inside(measuring.study_page(workspace)) == ""
    with pytest.raises(BadInputError, match=r"study\.html"):
        measuring.make_study(workspace, 2)
