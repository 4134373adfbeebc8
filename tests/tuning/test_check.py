"""`mixofshow check`: each kind of trouble is one row, the folder stays as it is, and the exit code tells."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mixofshow import cli
from mixofshow.errors import DatasetError, ResourceError
from mixofshow.tuning import check
from mixofshow.tuning.check import check_folder, report
from mixofshow.tuning.dataset import Finding, read_folder, readings

SIZE = (40, 36)


@pytest.fixture
def folder(tmp_path):
    """Pictures that are used as they are."""
    pictures = tmp_path / "data" / "pictures"
    pictures.mkdir(parents=True)
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", SIZE, colour).save(pictures / f"good{number}.png")
        (pictures / f"good{number}.txt").write_text("a <cat>")
    return pictures


def _with_masks(pictures):
    masks = pictures.parent / "masks"
    masks.mkdir()
    for path in pictures.glob("good*.png"):
        Image.new("L", SIZE, 255).save(masks / path.name)
    return masks


def _cut(pictures):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(pictures / "x.png")
    (pictures / "x.png").write_bytes((pictures / "x.png").read_bytes()[:5000])


def _moving(pictures):
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    frames[0].save(pictures / "x.webp", save_all=True, append_images=frames[1:])


def _rotated(pictures):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE, "lime").save(pictures / "x.jpg", exif=exif)


def _black_mask(pictures):
    Image.new("L", SIZE, 0).save(_with_masks(pictures) / "good1.png")


def _other_mask(pictures):
    Image.new("L", (9, 9), 255).save(_with_masks(pictures) / "good1.png")


def _no_mask(pictures):
    (_with_masks(pictures) / "good1.png").unlink()


def _bad_metadata(pictures):
    (pictures / "metadata.jsonl").write_text('\n{"file_name": "y.png", "text": "a"}\n')


TROUBLES = {
    "zero bytes": (lambda p: (p / "x.png").write_bytes(b""), "x.png", "error", "the file is empty"),
    "cut": (_cut, "x.png", "error", "not a readable picture"),
    "pixels": (
        lambda p: Image.new("1", (10_000, 5_001)).save(p / "x.png"),
        "x.png",
        "error",
        "10000 x 5001 pixels, at most 50000000",
    ),
    "animated": (_moving, "x.webp", "error", "an animation of 2 frames"),
    "16 bits": (lambda p: Image.new("I;16", SIZE, 9).save(p / "x.png"), "x.png", "note", "16 bits per channel"),
    "cmyk": (lambda p: Image.new("CMYK", SIZE).save(p / "x.jpg"), "x.jpg", "note", "CMYK is turned into RGB"),
    "rotated": (_rotated, "x.jpg", "note", "turned upright (EXIF orientation 6)"),
    "transparent": (
        lambda p: Image.new("RGBA", SIZE).save(p / "x.png"),
        "x.png",
        "note",
        "transparency is filled with white",
    ),
    "profile": (
        lambda p: Image.new("RGB", SIZE).save(p / "x.png", icc_profile=b"junk"),
        "x.png",
        "note",
        "its colour profile cannot be used",
    ),
    "small": (lambda p: Image.new("RGB", (1, 1)).save(p / "x.png"), "x.png", "note", "only 1 x 1 pixels"),
    "encoding": (lambda p: (p / "good1.txt").write_bytes(b"s\xfc\xdf"), "good1.txt", "error", "not UTF-8 at byte 1"),
    "empty caption": (lambda p: (p / "good1.txt").write_bytes(b" "), "good1.txt", "warning", "good1.png is empty"),
    "nul": (lambda p: (p / "good1.txt").write_bytes(b"a\0<cat>"), "good1.txt", "note", "NUL characters"),
    "several lines": (
        lambda p: (p / "good1.txt").write_bytes(b"a <cat>\r\n\r\n a cat\n"),
        "good1.txt",
        "warning",
        "its 2 lines are one caption; other tools take one of them",
    ),
    "metadata": (_bad_metadata, "metadata.jsonl", "error", "line 2: no picture 'y.png' in the folder"),
    "duplicate": (
        lambda p: Image.new("RGB", SIZE, "red").save(p / "x.webp", lossless=True),
        "x.webp",
        "warning",
        "the same picture as good0.png",
    ),
    "mask size": (_other_mask, "good1.png", "error", "its mask has 9 x 9 pixels, the picture has 40 x 36"),
    "missing mask": (_no_mask, "good1.png", "error", "no mask in"),
    "black mask": (_black_mask, "good1.png", "warning", "its mask is all black"),
    "other kind": (lambda p: (p / "x.heic").write_bytes(b""), "x.heic", "warning", "not read"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_is_one_finding_and_the_same_for_tuning(folder, trouble):
    make, file, level, message = TROUBLES[trouble]
    make(folder)
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    (finding,) = [one for one in check_folder(folder) if one.file != "masks/"]
    assert (finding.file, finding.level) == (file, level) and message in finding.message
    in_this_process = readings(folder, instance_prompt="the instance prompt")
    assert [finding] == [one for each in in_this_process for one in each.findings if one.file != "masks/"]
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before
    if level == "error":
        with pytest.raises(DatasetError) as raised:
            read_folder(folder, instance_prompt="a cat")
        assert str(finding) in str(raised.value)
    else:
        assert len(read_folder(folder, instance_prompt="a cat")) >= 2


def test_there_is_nothing_to_say_about_pictures_that_are_used_as_they_are(folder):
    assert check_folder(folder) == []
    _with_masks(folder)
    assert list(map(str, check_folder(folder))) == [
        "masks/: 2 of 2 pictures have masks, of the folder beside theirs; `masks` names another"
    ]


FATAL = """
import os
from mixofshow.tuning.dataset import read_one

def read(path, beside):
    if "crash" in path.name:
        os.abort()
    if "eater" in path.name:
        bytearray(2**60)
    return read_one(path, beside)
"""


@pytest.fixture
def fatal(tmp_path, monkeypatch):
    """Pictures of some names are read by a decoder that they are too much for; it is a file, so that a child finds it."""
    (tmp_path / "fatal.py").write_text(FATAL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(check, "_read", importlib.import_module("fatal").read)
    yield
    del sys.modules["fatal"]


@pytest.mark.parametrize(
    ("masked", "where"), [(False, ""), (True, ", here or in its mask")], ids=["without masks", "with masks"]
)
def test_what_the_decoder_does_not_survive_is_an_error_and_the_rest_is_read(folder, fatal, masked, where):
    for name in ("crash1", "crash2", "good0eater", "good2"):  # two in a row, one between good ones
        Image.new("RGB", (1, 1), "lime").save(folder / f"{name}.png")
    if masked:
        (_with_masks(folder) / "good2.png").unlink()
        Image.new("L", (1, 1), 255).save(folder.parent / "masks" / "good2.png")
    assert [str(finding) for finding in check_folder(folder) if finding.file != "masks/"] == [
        f"crash1.png: the decoder crashed{where}",
        f"crash2.png: the decoder crashed{where}",
        f"good0eater.png: the decoder needs more than 4 GB of memory{where}",
        "good2.png: only 1 x 1 pixels: it will be enlarged",
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux keeps a limit of memory")
def test_a_picture_that_needs_more_than_the_limit_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(check, "MEMORY", 2**27)
    Image.new("1", (7000, 7000)).save(folder / "good0large.png")
    (finding,) = [one for one in check_folder(folder) if one.file != "masks/"]
    assert finding == Finding("good0large.png", "error", "the decoder needs more than 0.125 GB of memory")


def test_a_child_that_does_not_start_is_no_fault_of_a_picture(folder, monkeypatch):
    monkeypatch.setattr(check, "_prepare", os._exit)
    monkeypatch.setattr(check, "MEMORY", 1)  # and so the code it ends with
    with pytest.raises(ResourceError, match="no process can be started to decode pictures in"):
        check_folder(folder)


def test_a_check_does_not_wait_for_torch():
    script = "import sys, mixofshow.tuning.check; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_all_of_a_picture_is_found_not_only_the_first(folder):
    masks = _with_masks(folder)
    for path in (folder / "good1.png", folder / "good1.txt", masks / "good1.png"):
        path.write_bytes(b"\xff")
    findings = check_folder(folder)
    assert [(finding.file, finding.level) for finding in findings] == [
        ("masks/", "warning"),
        ("good1.png", "error"),
        ("good1.txt", "error"),
        ("good1.png", "error"),
    ]
    assert "its mask masks/good1.png: not a readable picture" in findings[3].message


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ("", None),
        ("note warning", None),
        ("error note", "a[red].png cannot be used"),
        ("error error", "2 files cannot be used"),
    ],
)
def test_the_report_names_all_and_ends_with_an_error_if_one_is(levels, message, tmp_path, capsys):
    findings = [
        Finding(f"{letter}[red].png", level, f"message {letter}")
        for letter, level in zip("ab", levels.split(), strict=False)
    ]
    if message:
        with pytest.raises(DatasetError) as raised:
            report(findings, tmp_path / "found.json")
        assert str(raised.value).startswith(message)
    else:
        report(findings, tmp_path / "found.json")
    printed = capsys.readouterr().out
    assert all(text in printed for finding in findings for text in (finding.file, finding.level, finding.message))
    assert findings or "nothing to say" in printed
    table = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [Finding(**entry) for entry in table["findings"]] == findings


def _run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mixofshow", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, capsys.readouterr()


def test_its_table_names_options_as_the_command_line_has_them(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    (folder.parent / "masks").mkdir()
    for path in folder.glob("*.png"):
        Image.open(path).convert("L").save(folder.parent / "masks" / path.name)
    assert "beside theirs; --masks names another" in _run(monkeypatch, capsys, folder)[1].out


def test_the_command_ends_with_0_or_2(folder, tmp_path, monkeypatch, capsys):
    code, written = _run(monkeypatch, capsys, folder)
    assert (code, written.err) == (0, "") and "nothing to say" in written.out
    (folder / "bad.png").write_bytes(b"")
    code, written = _run(monkeypatch, capsys, folder, "--json", tmp_path / "found.json")
    assert code == 2 and "the file is empty" in " ".join(written.out.split())
    assert written.err == (
        "error: bad.png cannot be used; repair what the table names, or leave it out with --skip-bad\n"
    )
    assert json.loads((tmp_path / "found.json").read_text())["findings"][0]["level"] == "error"


@pytest.mark.parametrize("what", ["folder", "masks"])
def test_the_command_names_what_is_not_there(folder, tmp_path, monkeypatch, capsys, what):
    nowhere = tmp_path / "nowhere"
    arguments = (nowhere,) if what == "folder" else (folder, "--masks", nowhere)
    code, written = _run(monkeypatch, capsys, *arguments)
    assert code == 2 and f"{nowhere}: no such folder of" in written.err
