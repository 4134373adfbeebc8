"""Outputs destroy nothing: neither what a user keeps in a folder, nor what is read, nor each other.

Covers B1, B35, F15, F16, F20, G1, G5 and case 01 (what may be written where), B23, F26, F29 and G2 (exchanging folders),
and B36.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mixofshow import cli, outputs
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.interchange.exporting import export_concept
from mixofshow.concepts.model import ConceptModel, load_model, with_concept
from mixofshow.errors import BadInputError, ResourceError
from mixofshow.evaluation import previews
from mixofshow.evaluation.report import templates
from mixofshow.evaluation.results import COLUMNS
from mixofshow.evaluation.tasks import _measured
from mixofshow.files import write_tensors
from mixofshow.outputs import check_outputs, writing, writing_folder
from mixofshow.replaceable import KINDS, LISTING, kind_of
from mixofshow.sampling.drawing import YAML_HEAD
from mixofshow.sampling.pictures import write_picture
from mixofshow.studio.tuning import HEAD as SETTINGS_HEAD
from mixofshow.tuning import checkpoints
from mixofshow.tuning.checkpoints import run_folder

GOLDEN_BASE = str(Path(__file__).parents[1] / "goldens" / "pipeline")


def everything(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by path."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run("fuse a --out b")` in a folder of its own: exit code and standard error."""
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mixofshow", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    return command


@pytest.fixture
def place(tmp_path, golden_concepts):
    """Two concepts in a folder with holiday pictures, a base, a composition."""
    kept = tmp_path / "kept"
    kept.mkdir()
    for concept in golden_concepts:
        concept.save(kept / f"{concept.info.name}.safetensors")
    (kept / "holiday.txt").write_text("the beach")
    (tmp_path / "train").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "train" / "00.png")
    (tmp_path / "scene.yaml").write_text("prompt: a man\nimage: start.png\nregions: [{mask: mask.png, prompt: a cat}]")
    for name, mode in (("start", "RGB"), ("mask", "L")):
        Image.new(mode, (64, 64), "white").save(tmp_path / f"{name}.png")
    for name in ("own", "own-001"):
        Image.new("RGB", (64, 64), "green").save(tmp_path / f"{name}.png")
    (tmp_path / "own.html").write_text(OTHER_KINDS["a page of the user's"].decode())
    (tmp_path / "own.json").write_text('{"name": "a project"}')
    (tmp_path / "list.yaml").write_text("concepts: [kept/dogx.safetensors]\nmethod: average")
    return tmp_path


A, B = "kept/dogx.safetensors", "kept/manx.safetensors"
TUNE = f"tune --data train --name dog --class-word man --base {GOLDEN_BASE}"
SAMPLE = f"sample --model {GOLDEN_BASE} --size 64x64"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"fuse {A} {B} --out kept", "kept: holds dogx.safetensors and 2 more"),
        (f"convert {A} kept --to diffusers", "kept: holds dogx.safetensors and 2 more"),
        (f"convert {A} train --to kohya", "train: holds 00.png, which"),
        (f"fuse {A} {B} --as-delta {A}", "is read"),
        (f"fuse {A} {B} --out f --report {B}", "is read"),
        (f"fuse {A} {B} --out f --report f/r.html", "f: is replaced as a whole, with f/r.html in it"),
        (f"fuse {A} {B} --out f --statistics f/kept", "f: is replaced as a whole, with f/kept in it"),
        (f"fuse {A} {B} --as-delta d.x --report d.x", "d.x: is to be written twice"),
        (f"fuse list.yaml --as-delta {A}", "is read"),
        ("fuse list.yaml --out f --report list.yaml", "is read"),
        (f"fuse {A} --as-delta {GOLDEN_BASE}/unet/more.safetensors --base {GOLDEN_BASE}", "which is read"),
        (f"record {A} --out {A}", "exists and is not a folder"),
        (f"convert {A} {A} --name zed", "is read"),
        (f"convert kept/manx.safetensors {A} --embeddings {A}", "is read"),
        (f"{SAMPLE} --prompt a --concept {A} --out {A}", "is read"),
        (f"{SAMPLE} scene.yaml --out scene.yaml", "is read"),
        (f"{SAMPLE} scene.yaml --out start.png", "is read"),
        (f"{SAMPLE} scene.yaml --out mask.png", "is read"),
        (f"{SAMPLE} scene.yaml --num 2 --out a.png --show-layout a-001.png", "to be written twice"),
        (f"{SAMPLE} --prompt a --out a.png --show-layout a.png", "to be written twice"),
        ("replay start.png --out start.png", "is read"),
        (f"{TUNE} --out train/00.png", "lies in train, which is read"),
        (f"{TUNE} --out .", ".: cannot be the name of a new regular file"),
        (f"{TUNE} --out /", "/: cannot be the name of a new regular file"),
        (f"{TUNE} --out=", ".: cannot be the name of a new regular file"),
        (f"{TUNE} --out train/dog.safetensors", "lies in train, which is read"),
        (f"evaluate {A}=train --json {A}", "is read"),
        (f"evaluate {A}=train --json train/findings.json", "which is read"),
        ("check train --json train/00.png", "which is read"),
        (
            f"convert {A} start.png --base {GOLDEN_BASE}",
            "start.png: there is a file that is no safetensors of this program's",
        ),
        (f"{TUNE} --out mask.png", "mask.png: there is a file that is no safetensors"),
        (f"fuse {A} --as-delta start.png --base {GOLDEN_BASE}", "start.png: there is a file that is no safetensors"),
        (f"fuse {A} --as-delta d.x --report own.html --base {GOLDEN_BASE}", "own.html: there is a file that is no HTML of"),
        (f"{SAMPLE} --prompt a --out own.png", "own.png: there is a file that is no PNG of this program's"),
        (f"{SAMPLE} --prompt a --num 2 --out own.png", "own-001.png: there is a file that is no PNG of this program's"),
        (f"{SAMPLE} --prompt a --out a.png --show-layout own.png", "own.png: there is a file that is no PNG"),
        (f"{SAMPLE} --prompt a --grid own.png", "own.png: there is a file that is no PNG"),
        ("replay start.png --out own.png", "own.png: there is a file that is no PNG"),
        ("study build . --pairs a,b --out own.html", "own.html: there is a file that is no HTML"),
        ("check train --json own.json", "own.json: there is a file that is no JSON"),
        (f"evaluate {A}=train --json start.png", "start.png: there is a file that is no JSON"),
        ("study score list.yaml --json kept/../list.yaml", "is read"),
    ],
)
def test_what_a_user_has_is_never_written_over(line, message, place, run):
    before = everything(place)
    code, error = run(line)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert everything(place) == before


def _png(**texts: str) -> bytes:
    about, data = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        about.add_text(key, text)
    Image.new("L", (8, 8)).save(data, "PNG", pnginfo=about)
    return data.getvalue()


def _checkpoint(content: object) -> bytes:
    torch.save(content, data := io.BytesIO())
    return data.getvalue()


OTHER_KINDS = {
    "heic": b"\0\0\0\x1cftypheic",
    "avif": b"\0\0\0\x1cftypavif",
    "jpg": b"\xff\xd8\xff\xe0",
    "pdf": b"%PDF-1.7",
    "txt": b"the beach",
    "yaml": b"prompt: a cat",
    "toml": b"[tool]",
    "rtf": b"{\\rtf1",
    "zip": b"PK\x03\x04",
    "another tool's LoRA": safetensors.torch.save({"lora_up": torch.zeros(1)}, {"format": "pt", "ss_network_dim": "4"}),
    "another tool's JSON": b'{"name": "a project", "version": 1}',
    "a schema of another's": b'{"schema": 2, "nodes": []}',
    "another's times": b'{"seconds": 12.5, "frames": 300}',
    "another tool's list": b'[{"lora_path": "a.safetensors"}]',
    "a page of the user's": b'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>The beach</title></head>',
    "another tool's page": b'<!DOCTYPE html><html><head><meta name="generator" content="Quarto"></head>',
    "a table of the user's": b"name,age\nmixofshow,1\n",
    "a picture of the user's": _png(),
    "another tool's picture": _png(Software="GIMP", Comment="mixofshow"),
    "an archive of torch's": _checkpoint({"weights": torch.zeros(1)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_is_replaced_by_one_of_another_kind(kind, tmp_path):
    """By what a file is, whatever it is called; what is empty, or of the same kind, may be written anew."""
    path = tmp_path / "it"
    write_tensors(path, {"a": torch.zeros(1)}, {"format": "pt", "mixofshow": "{}"})
    ours = {
        "safetensors": path.read_bytes(),
        "PNG": _png(Software="mixofshow"),
        "HTML": b'<!DOCTYPE html>\n<html><head><meta name="generator" content="mixofshow">',
        "JSON": b'{\n "findings": []}',
        "YAML": YAML_HEAD.encode() + b"\n",
        "settings": SETTINGS_HEAD.encode(),
        "CSV": ",".join(COLUMNS).encode() + b"\n",
        "checkpoint": _checkpoint({"step": 3, "identity": {"facts": {}}, "state": {}}),
    }
    for other in [*OTHER_KINDS.values(), *(start for name, start in ours.items() if name != kind)]:
        path.write_bytes(other)
        with pytest.raises(
            BadInputError, match=f"it: there is a file that is no {kind} of this .*choose another name"
        ):
            check_outputs(files={kind: [path]})
        with pytest.raises(BadInputError, match="it: there is a file that is no"), writing(path) as temporary:
            temporary.write_bytes(ours[kind])
        assert path.read_bytes() == other
    for good in (b"", ours[kind]):
        path.write_bytes(good)
        check_outputs(files={kind: [path]})
        with writing(path) as temporary:
            temporary.write_bytes(ours[kind])


def test_what_is_written_is_known_as_ours(tmp_path):
    """Pictures with a note and without, pages of every template, costs and checkpoints: each may be written anew."""
    small = Image.new("RGB", (16, 16))
    write_picture(small, tmp_path / "layout")
    write_picture(small, tmp_path / "picture", '{"composition": {}}')
    (tmp_path / "page").write_text(templates().from_string('{% extends "page.html.j2" %}').render())
    study, _, _ = templates().loader.get_source(templates(), "study.html.j2")
    (tmp_path / "study").write_text(study)
    checkpoints.save(tmp_path, 3, {}, checkpoints.Identity({}, {}))
    with _measured(tmp_path / "fused.safetensors", "cpu"):
        pass
    found = {path.name: kind_of(path) for path in tmp_path.iterdir()}
    pages = dict.fromkeys(("page", "study"), "HTML")
    assert found == {"layout": "PNG", "picture": "PNG", **pages, "step-00000003.pt": "checkpoint", "fused.cost.json": "JSON"}


@pytest.mark.parametrize("name", ["a\0b", "a\0b/c", "a\0b.png"])
def test_a_name_with_a_nul_is_no_name(name, tmp_path):
    """Some calls of the system's refuse it, others take it for one that is not there."""
    path = tmp_path / name
    for where in ({"files": {"PNG": [path]}}, {"folders": [path]}, {"shared": [path]}):
        with pytest.raises(BadInputError, match=r"a\\x00b.*: cannot be written \(its name holds a NUL character\)"):
            check_outputs(**where)
    for writes in (writing, writing_folder):
        with pytest.raises(BadInputError, match="NUL"), writes(path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_concept_is_saved_over_no_picture_in_python_too(golden_concepts, place):
    with pytest.raises(BadInputError, match="start.png: there is a file that is no safetensors"):
        golden_concepts[0].save(place / "start.png")
    assert (place / "start.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--out ~/x.safetensors", "--out=~/x.safetensors"])
def test_the_home_folder_is_meant_also_where_the_shell_left_it(option, place, run, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "train"))
    code, error = run(f"{TUNE} {option}")
    assert code == 2 and "x.safetensors: lies in train, which is read" in error


def test_a_link_to_what_is_read_is_what_is_read(place, run):
    (place / "other").symlink_to("kept")
    code, error = run(f"fuse {A} --as-delta other/dogx.safetensors")
    assert code == 2 and "is read" in error


def test_a_folder_of_the_users_is_refused_in_python_too(golden_pipeline, golden_concepts, place):
    before = everything(place)
    with pytest.raises(BadInputError, match="kept: holds dogx.safetensors and 2 more"):
        with_concept(golden_pipeline, golden_concepts[0]).save(place / "kept")
    with pytest.raises(BadInputError, match="kept: holds"):
        export_concept(golden_concepts[0], golden_pipeline, place / "kept", "kohya")
    assert everything(place) == before


@pytest.mark.parametrize("kind", ["model", "kohya", "diffusers"])
def test_what_we_wrote_is_replaced_as_long_as_it_holds_nothing_else(golden_pipeline, golden_concepts, tmp_path, kind):
    def save(number: int) -> None:
        if kind == "model":
            with_concept(golden_pipeline, golden_concepts[number]).save(tmp_path / "f")
        else:
            export_concept(golden_concepts[number], golden_pipeline, tmp_path / "f", kind)

    save(0)
    first = everything(tmp_path / "f")
    (tmp_path / "f" / ".DS_Store").touch()
    save(1)
    assert "dogx" in str(first) and everything(tmp_path / "f").keys() != first.keys()
    for name in ("holiday.txt", "unet/holiday.jpg", "concepts/mine.safetensors"):
        (tmp_path / "f" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "f" / name).write_text("mine")
        with pytest.raises(BadInputError, match=f"holds {name}, which"):
            save(0)
        (tmp_path / "f" / name).unlink()
    save(0)
    assert everything(tmp_path / "f") == first
    assert [one.name for one in tmp_path.iterdir()] == ["f"]


def test_what_others_changed_in_a_folder_of_ours_is_not_lost(tmp_path):
    def write() -> None:
        with writing_folder(tmp_path / "f") as folder:
            (folder / "README.md").write_text("as we wrote it")

    write()
    write()
    (tmp_path / "f" / "README.md").write_text("with a word of mine")
    with pytest.raises(BadInputError, match=r"holds README\.md"):
        write()


def test_a_folder_into_which_something_is_put_meanwhile_is_kept(tmp_path):
    with writing_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(BadInputError, match="holds mine"), writing_folder(tmp_path / "f") as folder:
        (tmp_path / "f" / "mine").write_text("2")
    assert everything(tmp_path / "f").keys() == {"a", "mine", LISTING}


@pytest.mark.parametrize("exchange", [True, False], ids=["at once", "one after the other"])
def test_there_is_always_a_whole_folder_of_the_name(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)

    def write(text: str) -> None:
        with writing_folder(tmp_path / "f") as folder:
            (folder / "a").write_text(text)

    write("1")
    write("2")
    assert (tmp_path / "f" / "a").read_text() == "2"
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if target == tmp_path / "f" and outputs.ASIDE not in path.parts:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)
    with pytest.raises(ResourceError, match="nothing was changed"):
        write("3")
    assert (tmp_path / "f" / "a").read_text() == "2"
    assert [one.name for one in tmp_path.iterdir()] == ["f"]


def test_the_system_exchanges_folders_at_once(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not outputs._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or its disk cannot")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()


def test_what_a_killed_process_left_is_put_back_and_swept(tmp_path):
    killed = tmp_path / "0123".join(outputs.STAGING)
    (killed / outputs.ASIDE / "f").mkdir(parents=True)
    (killed / outputs.ASIDE / "f" / "old").touch()
    (killed / "f").mkdir()
    working = tmp_path / "4567".join(outputs.STAGING)
    working.mkdir()
    with outputs.holding(working), writing(tmp_path / "other.txt") as file:
        file.write_text("1")
    assert {one.name for one in tmp_path.iterdir()} == {"f", "other.txt", working.name}
    assert (tmp_path / "f" / "old").exists()


def test_a_model_that_was_about_to_be_replaced_is_found_by_its_reader(golden_pipeline, tmp_path):
    killed = tmp_path / "0123".join(outputs.STAGING) / outputs.ASIDE
    killed.mkdir(parents=True)
    ConceptModel(golden_pipeline).save(killed / "f")
    assert load_model(tmp_path / "f").vocabulary.embeddings == {}
    assert [one.name for one in tmp_path.iterdir()] == ["f"]


def test_a_run_keeps_away_from_pictures(tmp_path):
    target = tmp_path / "dog.safetensors"
    assert run_folder(target) == tmp_path / "dog"
    (tmp_path / "dog").mkdir()
    assert run_folder(target, [tmp_path / "dog"]) == tmp_path / "dog-run"
    (tmp_path / "dog" / "checkpoints").mkdir()
    assert run_folder(target) == tmp_path / "dog"
    (tmp_path / "dog" / "checkpoints").rmdir()
    (tmp_path / "dog" / "holiday.jpg").touch()
    assert run_folder(target) == tmp_path / "dog-run"
    assert run_folder(tmp_path / "noext") == tmp_path / "noext-run"
    assert run_folder(tmp_path / "foo.v1") != run_folder(tmp_path / "foo.v2")


def test_previews_and_checkpoints_stay_out_of_the_pictures_and_the_line_can_be_repeated(tmp_path, run, monkeypatch):
    """Case 01: the command of docs/own-concept.md, whose file is called as the folder of pictures."""
    monkeypatch.setattr(previews, "STEPS", 1)
    (tmp_path / "dog").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "dog" / "a.png")
    line = f"tune --data dog --name dog --class-word man --base {GOLDEN_BASE} --out dog.safetensors --batch-size 1"
    line += " --steps 2 --save-every 1 --preview-every 1 --tracker none --device cpu --resume"
    for _ in range(2):
        code, error = run(line)
        assert code == 0, error
    assert [one.name for one in (tmp_path / "dog").iterdir()] == ["a.png"]
    assert {one.name for one in (tmp_path / "dog-run").iterdir()} == {"checkpoints", "000001.png", "000002.png"}


def test_outputs_may_be_texts_and_writing_says_nothing(golden_pipeline, golden_concepts, tmp_path, capfd):
    golden_concepts[0].save(str(tmp_path / "a.safetensors"))
    model = with_concept(golden_pipeline, load_concept(tmp_path / "a.safetensors"))
    model.save(str(tmp_path / "f"))
    model.save_delta(str(tmp_path / "d.safetensors"))
    write_tensors(str(tmp_path / "t"), {"a": torch.zeros(1)}, {})
    assert len(list(tmp_path.iterdir())) == 4
    assert capfd.readouterr() == ("", "")
