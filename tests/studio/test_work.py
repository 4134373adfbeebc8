"""Concepts and tuning in the studio, without a page: what a job makes is what the command line makes."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixofshow import cli
from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.interchange.exporting import export_concept
from mixofshow.errors import BadInputError, DatasetError, MixOfShowError, SettingsError
from mixofshow.fusion.settings import FusionSettings
from mixofshow.images import read_grey
from mixofshow.reading import read_table
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.pictures import embedded
from mixofshow.studio import comparing, compose, fusing, measuring, shelf, sketching, tuning
from mixofshow.studio.commands import line, options
from mixofshow.studio.compose import Studio
from mixofshow.studio.drawing import OWN
from mixofshow.studio.forms import table_of, values_of
from mixofshow.studio.jobs import Job
from mixofshow.studio.tab_measure import MeasureTab
from mixofshow.studio.workspace import Workspace
from mixofshow.tuning.settings import make_settings, with_presets

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "concepts"
ONE = {"<clown>": 1}
QUICK = {"steps": 2, "prompts": ["photo of a {}"], "picture_prompts": ["photo of a {}"]}


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    workspace = Workspace(tmp_path / "work")
    shelf.put_on(workspace, [EXAMPLES / "clown.safetensors", EXAMPLES / "robot.safetensors"])
    return Studio(workspace)


def typed(command: str, monkeypatch: pytest.MonkeyPatch, folder: Path, **instead: str) -> None:
    """Run a command in the workspace's folder, with some of its words exchanged."""
    words = [instead.get(word, word) for word in shlex.split(command)]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, words


# Commands.


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"steps": 3, "guard": False, "measure": True}, "--steps 3 --no-guard --measure"),
        ({"prompts": ["a {}", "b"], "max_memory": 0.5}, "--prompts 'a {}' --prompts b --max-memory 0.5"),
        ({"options": {"ridge": 0.1}, "weights": {"a": 2, "b": 1}}, "--set ridge=0.1 --weights a=2,b=1"),
    ],
)
def test_settings_are_said_as_options(table: dict[str, Any], words: str) -> None:
    assert shlex.join(options(table)) == words


def test_a_command_says_how_the_base_is_loaded_where_that_is_not_as_usual(tmp_path: Path) -> None:
    assert line(Workspace(tmp_path, loading={"device": "cpu", "dtype": None}), "fuse") == "mixofshow fuse"
    assert line(Workspace(tmp_path, loading={"device": "cpu"}), "tune", device="auto") == "mixofshow tune --device cpu"
    assert line(Workspace(tmp_path, loading={"dtype": "bf16"}), "fuse") == "mixofshow fuse --dtype bf16"


# Fusing.


def test_a_model_is_fused_as_its_command_does_it_and_says_what_is_kept(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, progress, said = studio.workspace, Job.progress, set[str]()
    monkeypatch.setattr(Job, "progress", lambda job, *how: said.add(job.line) or progress(job, *how))
    job = studio.jobs.wait(fusing.start_fusing(studio, {"<clown>": 1, "<robot>": 0.8}, "two", QUICK))
    assert job.line == "fusing 2 concepts into 'two': done"
    assert all(any(f"looking at {word}" in line for line in said) for word in ("<clown>", "<robot>"))
    assert workspace.model_names() == ["two"]
    name, kept = job.facts
    assert name == "two" and set(kept) == {"clown", "robot"} and all(0 < share < 1 for share in kept.values())
    assert "&lt;clown&gt;" in fusing.bars(kept) and f"{kept['clown']:.0%}" in fusing.bars(kept)
    assert (workspace.models / "two.html").read_bytes().startswith(b"<!doctype html>")
    files, listed = fusing.sources(workspace, {"<clown>": 1, "<robot>": 0.8})
    assert files[0].read_text() == listed and '"unet_alpha": 0.8' in listed
    typed(
        fusing.command(workspace, files, "two", QUICK), monkeypatch, workspace.folder, **{"models/two": "models/same"}
    )
    parts = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "concepts.safetensors"]
    for part in parts:
        assert (workspace.models / "two" / part).read_bytes() == (workspace.models / "same" / part).read_bytes()


@pytest.mark.parametrize(
    ("words", "name", "given", "said"),
    [
        ({}, "two", {}, "tick the concepts"),
        (ONE, "../two", {}, "name of the model"),
        (ONE, "two", {"steps": 0}, "'steps'"),
        (ONE, "two", {"method": "gradeint"}, "did you mean 'gradient'"),
    ],
)
def test_what_cannot_be_fused_is_said_at_once(studio: Studio, words: Any, name: str, given: Any, said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        fusing.start_fusing(studio, words, name, given)


def test_as_strong_as_tuned_is_said_by_the_files_themselves(studio: Studio) -> None:
    files, listed = fusing.sources(studio.workspace, {"<clown>": 1.0, "<robot>": 1})
    assert [file.name for file in files] == ["clown.safetensors", "robot.safetensors"] and not listed
    for value in (None, ["<clown>"], {"<clown>": "1"}):
        with pytest.raises(SettingsError, match="how strong"):
            fusing.strengths_of(value)


def test_the_price_of_fusing_is_said() -> None:
    assert "draws 9 pictures of 20 steps" in fusing.cost(FusionSettings(), 3)
    assert "nothing is drawn" in fusing.cost(FusionSettings(method="average"), 3)


# The shelf.


def test_another_tools_lora_becomes_a_concept_with_its_notices(studio: Studio, tmp_path: Path) -> None:
    base = load_base("emojiland")
    done = export_concept(load_concept(EXAMPLES / "steamtrain.safetensors"), base, tmp_path / "kohya", "kohya", None)
    said = shelf.taken_in(
        studio.workspace, tmp_path / "kohya" / done.lora, "My Train!.safetensors", {"class_word": "car"}
    )
    assert [card.name for card in shelf.cards(studio.workspace)] == ["clown", "my-train", "robot"]
    assert "<my-train>" in said[0]
    with pytest.raises(BadInputError):
        shelf.taken_in(studio.workspace, studio.workspace.canvas, "x", {})


def test_what_is_taken_off_the_shelf_is_put_aside(studio: Studio) -> None:
    before = shelf.cards(studio.workspace)[0].path.read_bytes()
    for expected in (["clown.safetensors"], ["clown-2.safetensors"]):
        assert shelf.put_aside(studio.workspace, ["<clown>"]) == expected
        assert (studio.workspace.folder / "removed" / expected[0]).read_bytes() == before
        assert [card.name for card in shelf.cards(studio.workspace)] == ["robot"]
        shelf.put_on(studio.workspace, [EXAMPLES / "clown.safetensors"])


# Tuning.


@pytest.fixture
def pictures(studio: Studio, tmp_path: Path) -> list[Path]:
    write_concept("foxy", tmp_path / "foxy")
    found = sorted((tmp_path / "foxy" / "train").glob("*.png"))[:2]
    assert tuning.add_pictures(studio.workspace, "foxy", found) == []
    return found


def test_bad_pictures_are_refused_in_a_line_each_and_good_ones_kept_as_they_are(
    studio: Studio, pictures: list[Path], tmp_path: Path
) -> None:
    text, cut, huge = tmp_path / "<b>.png", tmp_path / "cut.png", tmp_path / "huge.png"
    text.write_text("<script>")
    cut.write_bytes(pictures[0].read_bytes()[:200])
    Image.new("1", (20_000, 20_000)).save(huge)
    said = tuning.add_pictures(studio.workspace, "foxy", [text, cut, *pictures, huge])
    assert [one.split(":")[0] for one in said] == ["<b>.png", "cut.png", "huge.png"]
    kept = tuning.pictures(studio.workspace, "foxy")
    assert [one.name for one in kept] == ["000.png", "001.png", "002.png", "003.png"]
    assert kept[3].read_bytes() == pictures[1].read_bytes()
    with pytest.raises(SettingsError, match="name: expected"):
        tuning.add_pictures(studio.workspace, "../foxy", pictures)


def test_captions_and_masks_are_what_tuning_reads(studio: Studio, pictures: list[Path]) -> None:
    workspace = studio.workspace
    assert tuning.captions(workspace, "foxy") == [["000.png", ""], ["001.png", ""]]
    rows = [["000.png", "a <foxy>\nhere"], ["001.png", "a <foxy>"]]
    assert tuning.write_captions(workspace, "foxy", rows) == 2
    assert tuning.captions(workspace, "foxy")[0] == ["000.png", "a <foxy> here"]
    assert tuning.write_captions(workspace, "foxy", [["001.png", " "]]) == 1
    with pytest.raises(SettingsError, match="no picture of <foxy>"):
        tuning.write_captions(workspace, "foxy", [["../../x.png", "a"]])
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    mask = tuning.write_mask(workspace, "foxy", "000.png", {"regions": [{"mask": embedded(half)}]})
    assert read_grey(mask, "mask").getpixel((5, 5)) == 255 and read_grey(mask, "mask").getpixel((60, 5)) == 0
    for picture, regions in (("../x.png", [{"mask": embedded(half)}]), ("000.png", [{"mask": "/etc/hostname"}])):
        with pytest.raises(SettingsError):
            tuning.write_mask(workspace, "foxy", picture, {"regions": regions})


def test_the_form_shows_what_this_base_needs() -> None:
    fields = tuning.tuning_fields("emojiland")
    usual = {one.key: one.default for one in fields}
    assert (usual["steps"], usual["unet.targets"]) == (250, "convolutions")
    given = {
        "name": "x",
        "class_word": "x",
        "data": "x",
        **table_of(fields, values_of(fields, {"unet.targets": "attention"})),
    }
    assert with_presets(make_settings(given), "emojiland").unet.targets == "attention"


def test_a_concept_is_tuned_stopped_and_resumed_as_the_command_does_it(
    studio: Studio, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = studio.workspace
    given = {"steps": 4, "batch_size": 1, "save_every": 2, "tracker": "none"}

    def stop(job: Any, step: int, *_: Any) -> None:
        progress(job, step, *_)
        if step == 2 and job.kind == tuning.KIND and not stopped:
            stopped.append(job)
            raise KeyboardInterrupt

    stopped: list[Any] = []
    progress = type(studio.jobs.submit("x", "x", lambda job: [])).progress
    monkeypatch.setattr("mixofshow.studio.jobs.Job.progress", stop)
    job = studio.jobs.wait(tuning.start_tuning(studio, "foxy", "dog", given, resume=False))
    assert job.state == "stopped" and "stopped after step 2 of 4" in " ".join(job.said)
    assert [card.name for card in shelf.cards(workspace)] == ["clown", "foxy", "robot"]
    job = studio.jobs.wait(tuning.start_tuning(studio, "foxy", "dog", given, resume=True))
    assert job.state == "done" and job.results == (workspace.concepts / "foxy.safetensors",), job.line
    assert [step for step, _ in job.curve] == [3, 4] and "polyline" in tuning.curve(job.curve)
    assert read_table(tuning.settings_file(workspace, "foxy"))["data"] == "tuning/foxy/pictures"
    assert tuning.known(workspace, "foxy")["class_word"] == "dog"
    made = (workspace.concepts / "foxy.safetensors").read_bytes()
    other = {"concepts/foxy.safetensors": "concepts/same.safetensors"}
    typed(tuning.command(workspace, "foxy"), monkeypatch, workspace.folder, **other)
    assert (
        load_concept(workspace.concepts / "same.safetensors").hash
        == load_concept(workspace.concepts / "foxy.safetensors").hash
    )
    anew = studio.jobs.wait(tuning.start_tuning(studio, "foxy", "dog", {**given, "steps": 2}, resume=False))
    assert anew.state == "done" and (workspace.concepts / "foxy.safetensors").read_bytes() != made
    assert (workspace.folder / "removed" / "foxy").is_dir()


def test_tuning_without_pictures_is_refused(studio: Studio) -> None:
    with pytest.raises(DatasetError, match="no pictures yet"):
        tuning.start_tuning(studio, "foxy", "dog", {}, resume=False)
    with pytest.raises(SettingsError, match="did you mean 'steps'"):
        tuning.start_tuning(studio, "foxy", "dog", {"stepz": 3}, resume=False)


# Uploads.


def _picture(**how: Any) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, **how)
    return data.getvalue()


def _doors() -> dict[str, Any]:
    """What takes uploads, by what it takes."""

    def in_folder(studio: Studio, path: Path) -> None:
        (said,) = tuning.add_pictures(studio.workspace, "foxy", [path])
        raise DatasetError(said)

    return {
        "a training picture": in_folder,
        "a picture of ours": lambda studio, path: compose.recalled(studio.workspace, path),
        "a picture to start from": lambda _, path: sketching.uploaded(path),
        "answers of a study": lambda _, path: measuring.preferences([path]),
        "a concept": lambda studio, path: shelf.taken_in(studio.workspace, path, path.name, {}),
        "results": lambda _, path: measuring.tables(measuring.results_in(path)),
    }


UPLOADS = {
    "nothing": b"",
    "a text": b"<script>alert(1)</script>",
    "zeros": bytes(1000),
    "half a picture": _picture(format="PNG")[:40],
    "an animation": _picture(format="GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]),
    "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "a pickle": b"\x80\x04K\x01." + bytes(100),
    "half a concept": (100).to_bytes(8, "little") + b"{",
    "JSON of another kind": b'{"a": [1, 2',
    "a lie about its length": (2**60).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("door", _doors())
def test_malformed_uploads_are_refused_in_one_line(studio: Studio, tmp_path: Path, door: str) -> None:
    path = tmp_path / "<img src=x>.png"
    for data in UPLOADS.values():
        path.write_bytes(data)
        with pytest.raises(MixOfShowError) as refused:
            _doors()[door](studio, path)
        assert str(refused.value) and "\n" not in str(refused.value)
    assert len(shelf.cards(studio.workspace)) == 2


# Comparing and measuring.


def test_a_comparison_draws_every_way_that_can_on_one_seed(studio: Studio) -> None:
    two = [
        {"prompt": f"a <{name}>", "box": box} for name, box in (("clown", [0, 0, 0.5, 1]), ("robot", [0.5, 0, 1, 1]))
    ]
    composition = make_composition({"prompt": "", "regions": two, "steps": 1, "width": 32, "height": 32, "num": 3})
    job = studio.jobs.wait(comparing.start_comparing(studio, composition, OWN))
    assert job.state == "done", job.line
    assert [label for _, label in job.facts] == [
        "each region by its own concept",
        "by weight fusion",
        "without regions, by weight fusion",
    ]
    drawn = [compose.recalled(studio.workspace, path) for path in job.results]
    assert {one.seed for one in drawn} == {0} and [len(one.regions) for one in drawn] == [2, 2, 0]
    model = studio.workspace.models / "weight-fusion-clown-robot" / "concepts.json"
    before = model.stat().st_mtime_ns
    studio.jobs.wait(comparing.start_comparing(studio, composition, OWN))
    assert model.stat().st_mtime_ns == before


def test_a_suites_results_are_shown_and_other_files_refused(tmp_path: Path) -> None:
    values = {"single": 0.8, "fused": 0.7, "change": -0.1}
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(SettingsError, match="not the results"):
        measuring.results_in(tmp_path / "other.json")
    with pytest.raises(SettingsError, match="hold no"):
        measuring.tables({"methods": {"a": values}, "bounds": {}})
    results = json.loads((ROOT / "benchmarks" / "results" / "2026-11-24-table1.json").read_text())
    alignment, (head, rows) = measuring.tables(results)
    assert alignment[0][0] and len(rows) + 1 == len(head) == len(rows[0])


def test_a_page_shows_what_was_measured_before_it_was_opened(studio: Studio) -> None:
    pytest.importorskip("gradio")
    tab, folder = object.__new__(MeasureTab), measuring.report_folder(studio.workspace)
    tab.studio = studio
    seen, *_, report = tab.watched(None)
    assert not getattr(report, "interactive", False)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text((ROOT / "benchmarks" / "results" / "2026-11-24-table1.json").read_text())
    (folder / "report.html").write_text("measured")
    for before in (None, seen):
        seen_now, _, _, alignment, _, _, nothing, report = tab.watched(before)
        assert alignment.visible and not nothing.visible and report.interactive
    assert not hasattr(tab.watched(seen_now)[3], "visible")


def test_what_is_measured_needs_pictures_held_out(studio: Studio, pictures: list[Path]) -> None:
    with pytest.raises(DatasetError, match="no concept has held-out"):
        measuring.start_measuring(studio, 1)
    with pytest.raises(SettingsError, match="no concept on the shelf"):
        measuring.add_held_out(studio.workspace, "<x>", pictures)
    with pytest.raises(SettingsError, match="choose a concept first"):
        measuring.add_held_out(studio.workspace, "", pictures)
    assert measuring.add_held_out(studio.workspace, "<clown>", pictures) == []
    assert [card.name for card in measuring.measurable(studio.workspace)] == ["clown"]
    assert "concepts/clown.safetensors=measured/clown" in measuring.command(studio.workspace, 2)
    called_results = dataclasses.replace(shelf.cards(studio.workspace)[0], name="results")
    place, report = measuring.held_out(studio.workspace, called_results), measuring.report_folder(studio.workspace)
    assert place != report and report not in place.parents


def test_what_people_answered_in_a_study_is_counted(tmp_path: Path) -> None:
    answer = {"item": 0, "left": "gradient", "right": "average", "image": "gradient", "text": "average"}
    file = tmp_path / "answers.json"
    file.write_text(json.dumps({"schema": 1, "study": "s", "rater": "r", "items": 1, "answers": [answer]}))
    head, rows = measuring.preferences([file])
    assert head[0] == "preferred" and [row[:4] for row in rows] == [
        ["average", "gradient", "image", "0.0%"],
        ["average", "gradient", "text", "100.0%"],
    ]
