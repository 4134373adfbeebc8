"""The command line: exit codes, one-line errors, and that nothing is lost."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mixofshow import cli
from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.interchange.exporting import export_concept
from mixofshow.errors import MixOfShowError
from mixofshow.files import write_tensors
from mixofshow.tuning.settings import make_settings, schema

GOLDEN_BASE = str(Path(__file__).parent / "goldens" / "pipeline")


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and standard error of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["mixofshow", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    code = stopped.value.code
    return (code if isinstance(code, int) else 0), capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (16, 16), "red").save(pictures / "good.png")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04K\x01." + bytes(100))
    (tmp_path / "cut.safetensors").write_bytes((100).to_bytes(8, "little") + b"{")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "bad.yaml").write_text("prompt: [unclosed")
    (tmp_path / "wrong.yaml").write_text("promt: a cat")
    (tmp_path / "typo.yaml").write_text("name: thing\nclass_word: man\ndata: x\nunet: {rnk: 8}")
    concept = "{name: thing, class_word: man, data: x}"
    (tmp_path / "twice.yaml").write_text(f"steps: 2\nconcepts: [{concept}, {concept}]")
    return tmp_path


CONCEPT = Path(__file__).parents[1] / "examples/concepts/clown.safetensors"
TUNE = ["tune", "--base", GOLDEN_BASE, "--name", "thing", "--class-word", "man", "--out", "{0}/thing.safetensors"]
SAMPLE = ["sample", "--model", GOLDEN_BASE, "--prompt", "a man", "--size", "64x64", "--out", "{0}/a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TUNE, "--data", "{0}/missing"], "missing: no such folder"),
        ([*TUNE, "--data", "{0}"], "no pictures in it"),
        (["tune", "{0}/typo.yaml"], "unknown key 'unet.rnk'; did you mean 'unet.rank'"),
        (["tune", "{0}/twice.yaml"], "two concepts are called thing"),
        ([*TUNE, "--data", "{0}/pictures", "--unet.rank", "four"], "'unet.rank'"),
        ([*TUNE, "--data", "{0}/pictures", "--tracker", "wandb"], "pip install wandb"),
        (["check", "{0}"], "no pictures in it"),
        (["fuse", "{0}/cut.safetensors", "--out", "{0}/x", "--set", "ridge"], "expected KEY=VALUE"),
        ([*TUNE[:4], "cat dog", *TUNE[5:], "--data", "{0}/pictures"], "'name': expected at most 31 of a-z"),
        ([*TUNE[:-1], "{0}/file/thing.safetensors", "--data", "{0}/pictures"], "cannot be written"),
        (["tune", "--base", "/nowhere/at all", *TUNE[3:], "--data", "{0}/pictures"], "no such folder"),
        (["fuse", "{0}/missing.safetensors", "--out", "{0}/fused"], "missing.safetensors: cannot be read"),
        (["fuse", "{0}/pickle.safetensors", "--out", "{0}/fused"], "pickles are never opened"),
        (["fuse", "{0}/cut.safetensors", "--out", "{0}/fused"], "the file is cut"),
        (["fuse", "{0}/cut.safetensors", "--out", "{0}/file"], "exists and is not a folder"),
        (["fuse", "{0}/cut.safetensors", "--out", "{0}/x", "--method", "gradeint"], "did you mean 'gradient'"),
        (["fuse", "{0}/cut.safetensors"], "nowhere to write to"),
        (["fuse", "{0}/cut.safetensors", "--out", "{0}/x", "--weights", "a=0"], "'weights.table.a'"),
        (["fuse", "{0}/wrong.yaml", "--out", "{0}/x"], "'concepts': expected a list of concept files"),
        (["fuse", "--model", "{0}/pictures", "--remove", "thing"], "concepts.json: cannot be read"),
        (["fuse", "--add", "{0}/cut.safetensors", "--out", "{0}/x"], "name its folder with --model"),
        (["record", "{0}/cut.safetensors", "--out", "{0}/x", "--storage", "fp8"], "storage: expected one of fp64"),
        ([*SAMPLE[:2], "{0}/cut.safetensors", *SAMPLE[3:]], "the file is cut"),
        (["inspect", "{0}/pictures/good.png"], "not safetensors"),
        (["convert", "{0}/cut.safetensors", "{0}/x.safetensors"], "the file is cut"),
        (["convert", "{0}/cut.safetensors", "{0}/x", "--to", "onnx"], "'to'"),
        (["convert", "{0}/cut.safetensors", "{0}/file", "--to", "kohya"], "exists and is not a folder"),
        (["convert", "{0}/cut.safetensors", "{0}/pictures"], "exists and is not a regular file"),
        ([*SAMPLE, "--region", "0,0,200,64: a man"], "outside the picture of 64 x 64"),
        ([*SAMPLE, "--region", "0,0,2,2: a man"], "too small"),
        ([*SAMPLE, "--region", "nonsense"], "left,top,right,bottom: prompt"),
        ([*SAMPLE, "--control", "nonsense"], "'controls.0.network'"),
        (
            [*SAMPLE, "--control", "network: emojiland-t2i-adapter, picture: '{0}/none.png'"],
            "none.png: cannot be read",
        ),
        (
            [*SAMPLE, "--control", "network: emojiland-t2i-adapter, picture: '{0}/pictures/good.png'"],
            "emojiland-t2i-adapter: channels of its levels: expected the base model's",
        ),
        (["sample", "--redo", "{0}/pictures/good.png", "--region", "2", "--prompt", "a"], "region 2: expected a box"),
        ([*SAMPLE, "--redo", "{0}/pictures/good.png", "--region", "2"], "size: expected none with redo"),
        (["sample", "--redo", "{0}/none.png", "--region", "2"], "none.png: cannot be read"),
        ([*SAMPLE, "--size", "63x64"], "multiple of 8 such as 64"),
        ([*SAMPLE[:4], "a <man>", *SAMPLE[5:]], "unknown concept '<man>'"),
        ([*SAMPLE[:-1], "{0}/file/a.png"], "cannot be written"),
        ([*SAMPLE, "--image", "{0}/pictures/good.png", "--image-strength", ".01"], "error: --image-strength: expected at"),
        ([*SAMPLE, "--upscale", "2", "--upscale-strength", ".01"], "error: --upscale-strength: expected at least 1 of 25"),
        ([*SAMPLE, "--strength", "11"], "error: --strength: expected at most 10, found 11.0"),
        ([*SAMPLE, "--strength", "nan"], "error: --strength: expected at most 10, found nan"),
        ([*SAMPLE, "--seed", "-1"], "'seed': input should be greater than or equal to 0, found -1"),
        ([*SAMPLE, "--variant", "fp16"], "no weights of the variant fp16 in it; leave out --variant"),
        (["sample", "{0}/bad.yaml"], "not valid YAML"),
        (["sample", "{0}/wrong.yaml"], "'prompt'"),
        (["evaluate", "just-a-file"], "expected FILE=FOLDER"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, arguments, message, capsys, monkeypatch):
    if arguments[0] in ("fuse", "record", "evaluate", "convert"):
        arguments = [*arguments, "--base", GOLDEN_BASE]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, error = _run([part.replace("{0}", str(folder)) for part in arguments], capsys, monkeypatch)
    line = error.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and message in line
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_full_disk_is_exit_code_3(folder, capsys, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    old = folder / "thing.safetensors"
    write_tensors(old, {"before": torch.zeros(1)}, {"format": "pt", "mixofshow_concept": "{}"})
    before = old.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    arguments = [*TUNE, "--data", "{0}/pictures", "--steps", "1"]
    code, error = _run([part.replace("{0}", str(folder)) for part in arguments], capsys, monkeypatch)
    assert code == 3 and "No space left" in error
    assert old.read_bytes() == before
    assert not list(folder.glob(".*"))


def test_tune_fuse_sample_inspect_on_a_foreign_base(folder, capsys, monkeypatch):
    def run(*arguments: str) -> None:
        code, error = _run([part.replace("{0}", str(folder)) for part in arguments], capsys, monkeypatch)
        assert code == 0, error

    run(*TUNE, "--data", "{0}/pictures", "--steps", "2")
    run("inspect", "{0}/thing.safetensors")
    run("fuse", "{0}/thing.safetensors", "--out", "{0}/fused", "--base", GOLDEN_BASE)
    wide = ["--size", "96x64", "--steps", "2", "--region", "0,0,48,64: a <thing>", "--prompt", "a man"]
    run("sample", "--model", "{0}/fused", *wide, "--out", "{0}/a.png")
    run("sample", "--model", "{0}/fused", *wide, "--out", "{0}/b.png")
    run(
        "sample",
        "--model",
        GOLDEN_BASE,
        "--concept",
        "{0}/thing.safetensors",
        *wide,
        "--num",
        "2",
        "--out",
        "{0}/c.png",
    )
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    assert (folder / "c-001.png").is_file()
    from mixofshow.sampling.replay import composition_of

    assert composition_of(folder / "a.png").regions[0].prompt == "a <thing>"
    assert composition_of(folder / "c-001.png").seed == 1
    run("replay", "{0}/a.png", "--model", "{0}/fused")
    assert (folder / "a-replay.png").read_bytes() == (folder / "a.png").read_bytes()
    sheet = ["--grid", "{0}/grid.png", "--num", "2", "--vary", "guidance_scale=1,4"]
    run("sample", "--model", "{0}/fused", *wide, *sheet)
    run(
        "sample",
        "--model",
        "{0}/fused",
        *wide,
        "--show-layout",
        "{0}/layout.png",
        "--isolate",
        "1",
        "--out",
        "{0}/d.png",
    )
    assert (folder / "grid.png").is_file() and (folder / "layout.png").is_file()
    assert composition_of(folder / "d.png").isolate == 1


def test_two_files_draw_a_region_each_without_fusing(golden_concepts, golden_pipeline, tmp_path, capsys, monkeypatch):
    def run(*arguments: str, code: int = 0) -> str:
        found, error = _run([part.replace("{0}", str(tmp_path)) for part in arguments], capsys, monkeypatch)
        assert found == code, error
        return error

    golden_concepts[0].save(tmp_path / "dogx.safetensors")
    export_concept(golden_concepts[1], golden_pipeline, tmp_path / "alice", "kohya")
    files = ["--concept", "{0}/dogx.safetensors", "--concept", "{0}/alice/manx.safetensors"]
    asked = [*SAMPLE[:2], GOLDEN_BASE, "--prompt", "two men", "--size", "96x64", "--steps", "2", *files]
    asked[1] = "--base"
    places = ["--region", "0,0,48,64: a <dogx>", "--region", "48,0,96,64: a man <lora:manx:0.8>"]
    run(*asked, *places, "--out", "{0}/a.png")
    run("replay", "{0}/a.png", "--base", GOLDEN_BASE, *files, "--out", "{0}/b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    other = replace(golden_concepts[0], embeddings=2 * golden_concepts[0].embeddings)
    other.save(tmp_path / "dogx.safetensors")
    assert "another model" in run("replay", "{0}/a.png", "--base", GOLDEN_BASE, *files, "--out", "{0}/c.png", code=2)
    assert "2 files without regions" in run(*asked, "--out", "{0}/d.png", code=2)


def test_places_are_found_saved_and_drawn_again(golden_concepts, tmp_path, capsys, monkeypatch):
    def run(*arguments: str, code: int = 0) -> str:
        found, error = _run([part.replace("{0}", str(tmp_path)) for part in arguments], capsys, monkeypatch)
        assert found == code, error
        return error

    for name, concept in zip(("dogx", "manx"), golden_concepts, strict=True):
        concept.save(tmp_path / f"{name}.safetensors")
    files = ["--base", GOLDEN_BASE, "--concept", "{0}/dogx.safetensors", "--concept", "{0}/manx.safetensors"]
    asked = ["sample", *files, "--prompt", "a <dogx> and a <manx>", "--size", "96x64", "--steps", "3"]
    auto = [*asked, "--regions", "auto", "--first-pass", "0.3"]
    run(*auto, "--show-layout", "{0}/l.png", "--save-regions", "{0}/f.yaml", "--out", "{0}/a.png")
    assert "changes nothing" not in run("sample", "{0}/f.yaml", *files, "--out", "{0}/b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    run("replay", "{0}/a.png", *files, "--out", "{0}/c.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert "--regions: expected auto, found 'all'" in run(*asked, "--regions", "all", "--out", "{0}/d.png", code=2)
    (tmp_path / "mine.yaml").write_text("prompt: a castle\n")
    refused = run(*asked, "--regions", "auto", "--save-regions", "{0}/mine.yaml", "--out", "{0}/d.png", code=2)
    assert "no YAML of this program's" in refused
    (tmp_path / "found-region-1.png").write_bytes(b"mine")
    (tmp_path / "found-region-x.png").write_bytes(b"mine")  # no name that anything is written to
    refused = run(*asked, "--regions", "auto", "--save-regions", "{0}/found.yaml", "--out", "{0}/e.png", code=2)
    assert "found-region-1.png" in refused and not (tmp_path / "e.png").exists()


def test_a_controlled_picture_is_replayed_while_its_files_are_there(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    controls = [
        f"network: emojiland-{kind}, picture: pictures/good.png, strength: 0.5"
        for kind in ("t2i-adapter", "controlnet")
    ]
    asked = [part for text in controls for part in ("--control", text)]
    code, error = _run(["sample", "--prompt", "a cat", "--steps", "2", *asked, "--out", "a.png"], capsys, monkeypatch)
    assert code == 0, error
    code, error = _run(["replay", "a.png"], capsys, monkeypatch)
    assert code == 0, error
    assert (folder / "a-replay.png").read_bytes() == (folder / "a.png").read_bytes()
    Image.new("RGB", (16, 16), "blue").save(folder / "pictures" / "good.png")
    code, error = _run(["replay", "a.png", "--out", "b.png"], capsys, monkeypatch)
    assert code == 2 and "pictures/good.png: another picture than before" in error
    assert not (folder / "b.png").exists()


def test_record_fuse_edit_and_draw_from_a_delta(golden_concepts, tmp_path, capsys, monkeypatch):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mixofshow", *(part.replace("{0}", str(tmp_path)) for part in arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        assert not stopped.value.code, shown.err
        return shown.out

    for concept in golden_concepts:
        concept.save(tmp_path / f"{concept.info.name}.safetensors")
    store = ["--storage", "low-rank", "--steps", "1", "--prompts", "a {}", "--prompts", "{}"]
    line = run("record", "{0}/dogx.safetensors", "--out", "{0}/kept", "--base", GOLDEN_BASE, *store)
    assert re.search(r"kept/dogx-\w+\.safetensors: .*dogx.safetensors, [\d.]+ MB, low-rank, relative error", line)
    found = ["--statistics", "{0}/kept", "--mode", "independent", "--refine", "0", *store]
    run("fuse", "{0}/dogx.safetensors", "--base", GOLDEN_BASE, "--out", "{0}/fused", *found)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    more = ["--add", "{0}/manx.safetensors", "--base", GOLDEN_BASE, "--weights", "dogx=2", "--leave-one-out"]
    more += ["--refit", "1"]
    out = ["--report", "{0}/report.html", "--as-delta", "{0}/fused.safetensors", "--rank", "3"]
    lines = run("fuse", "--model", "{0}/fused", *more, *out, "--statistics", "{0}/kept", "--storage", "low-rank")
    assert "fused: 2 concepts in" in lines and "MB, rank 3: relative error" in lines
    assert re.search(r"<manx> refitted: loss [\d.e-]+ -> [\d.e-]+\n", lines)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "costs the others" in page and "Refitted" in page
    drawn = ["--prompt", "a <dogx> and a <manx>", "--size", "64x64", "--steps", "1", "--out", "{0}/a.png"]
    run("sample", "--model", "{0}/fused.safetensors", "--base", GOLDEN_BASE, *drawn)
    assert (tmp_path / "a.png").is_file()


def test_the_example_of_a_fusion_runs(tmp_path, capsys, monkeypatch):
    example = Path(__file__).parents[1] / "examples" / "fuse-three.yaml"
    arguments = ["fuse", str(example), "--steps", "1", "--as-delta", str(tmp_path / "three.safetensors")]
    code, error = _run(arguments, capsys, monkeypatch)
    assert code == 0, error
    assert (tmp_path / "three.safetensors").is_file()


def test_a_concept_goes_to_another_tool_and_back(tmp_path, capsys, monkeypatch):
    example = CONCEPT
    for arguments in (
        [str(example), "{0}/out", "--to", "kohya"],
        ["{0}/out/clown.safetensors", "{0}/back.safetensors", "--embeddings", "{0}/out/clown-words.safetensors"],
    ):
        code, error = _run(
            ["convert", *(part.replace("{0}", str(tmp_path)) for part in arguments)], capsys, monkeypatch
        )
        assert code == 0, error
    back, concept = load_concept(tmp_path / "back.safetensors"), load_concept(example)
    assert back.deltas.keys() == concept.deltas.keys()
    assert back.info.base_fingerprint == concept.info.base_fingerprint


def test_the_printed_configuration_is_the_one_that_is_meant(folder, capsys, monkeypatch):
    given = ["--data", "{0}/pictures", "--unet.rank", "8", "--pictures.flip", "--loss.min_snr=5", "--no-loss.masked"]
    arguments = [part.replace("{0}", str(folder)) for part in (*TUNE, *given, "--print-config")]
    monkeypatch.setattr(sys, "argv", ["mixofshow", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    settings = make_settings(yaml.safe_load(capsys.readouterr().out))
    assert (settings.unet.rank, settings.pictures.flip, settings.loss.min_snr, settings.loss.masked) == (
        8,
        True,
        5,
        False,
    )
    assert (settings.name, settings.class_word, settings.base) == ("thing", "man", GOLDEN_BASE)


def test_one_file_of_settings_may_tune_several_concepts(folder, capsys, monkeypatch):
    table = {"base": GOLDEN_BASE, "data": str(folder / "pictures"), "steps": 9, "class_word": "man", "tracker": "none"}
    concepts = [{"name": "one"}, {"name": "two", "method": "lora", "unet": {"rank": 2}}]
    (folder / "both.yaml").write_text(yaml.safe_dump({**table, "concepts": concepts}))
    arguments = ["tune", str(folder / "both.yaml"), "--steps", "1", "--out", str(folder / "made"), "--device", "cpu"]
    code, error = _run(arguments, capsys, monkeypatch)
    assert code == 0, error
    one, two = (load_concept(folder / "made" / f"{name}.safetensors").info for name in ("one", "two"))
    assert (one.method, two.method, two.rank) == ("ed-lora", "lora", 2)
    assert one.settings["steps"] == two.settings["steps"] == 1


def test_the_schema_of_the_examples_is_the_settings_own():
    shipped = (Path(__file__).parents[1] / "examples" / "tune.schema.json").read_text(encoding="utf-8")
    assert shipped == schema()


VARIANT = ["--base", "{0}/half", "--variant", "fp16"]


@pytest.fixture
def half(folder, golden_pipeline, golden_concepts):
    """A base of which there are weights of one variant only, and a concept on it."""
    golden_pipeline.save_pretrained(folder / "half", variant="fp16")
    golden_concepts[0].save(folder / "dogx.safetensors")
    table = {"concepts": ["dogx.safetensors"], "base": "half", "method": "average"}
    (folder / "fuse.yaml").write_text(yaml.safe_dump(table))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        [*TUNE[:2], "{0}/half", *TUNE[3:], "--data", "{0}/pictures", "--steps", "1"],
        ["record", "{0}/dogx.safetensors", "--base", "{0}/half", "--out", "{0}/kept", "--steps", "1"],
        ["fuse", "{0}/dogx.safetensors", "--base", "{0}/half", "--out", "{0}/fused", "--method", "average"],
        ["fuse", "{0}/fuse.yaml", "--out", "{0}/fused"],
        [*SAMPLE[:2], "{0}/half", *SAMPLE[3:], "--steps", "1"],
        ["convert", "{0}/dogx.safetensors", "{0}/out", "--base", "{0}/half", "--to", "kohya"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]).replace("{0}/", ""),
)
def test_commands_take_a_variant_of_the_base(half, arguments, capsys, monkeypatch):
    given = [part.replace("{0}", str(half)) for part in arguments]
    code, error = _run(given, capsys, monkeypatch)
    assert (
        code == 2
        and "there are only weights of the variant fp16; give --variant fp16" in error.strip().splitlines()[-1]
    )
    code, error = _run([*given, "--variant", "fp16"], capsys, monkeypatch)
    assert code == 0, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{0}/dogx.safetensors={0}/no-pictures", "--base", "{0}/half"], "has no judge of its own"),
        (["sample", "--model", "{0}/half", "--prompt", "a <man>"], "unknown concept '<man>'"),
        (["replay", "{0}/pictures/good.png", "--model", "{0}/half"], "good.png"),
        (["evaluate", "{0}/suite.yaml"], "suite.yaml: cannot be read"),
    ],
)
def test_with_the_variant_only_what_else_is_wrong_is_said(half, arguments, message, capsys, monkeypatch):
    given = [part.replace("{0}", str(half)) for part in arguments]
    code, error = _run([*given, "--variant", "fp16"], capsys, monkeypatch)
    assert code == 2 and message in error.strip().splitlines()[-1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fused_and_drawn_in_half_precision(half, dtype, relative_error, capsys, monkeypatch):
    def run(*given):
        return _run([*given, "--dtype", dtype], capsys, monkeypatch)

    base = ["--base", str(half / "half"), "--variant", "fp16"]
    fuse = ["fuse", str(half / "dogx.safetensors"), *base, "--method", "average", "--out"]
    assert run(*fuse, str(half / "fused"))[0] == 0
    assert _run([*fuse, str(half / "exact")], capsys, monkeypatch)[0] == 0
    found, exact = (load_base(half / name, dtype=kept).unet for name, kept in (("fused", dtype), ("exact", "fp32")))
    assert found.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, weight in exact.state_dict().items():
        assert relative_error(found.state_dict()[name].float(), weight) < 2**-7, name
    drawn, again = half / "drawn.png", half / "again.png"
    model = ["--model", str(half / "fused")]
    assert run("sample", *model, "--prompt", "a <dogx>", "--steps", "1", "--size", "16x16", "--out", str(drawn))[0] == 0
    code, error = _run(["replay", str(drawn), *model, "--out", str(again)], capsys, monkeypatch)
    assert code == 2 and "another model" in error
    assert run("replay", str(drawn), *model, "--out", str(again))[0] == 0
    assert again.read_bytes() == drawn.read_bytes()


def test_an_unknown_precision_is_named(capsys, monkeypatch):
    code, error = _run(["sample", "--prompt", "a dog", "--dtype", "int4"], capsys, monkeypatch)
    assert code == 2 and error.strip().splitlines()[-1].endswith("expected one of fp32, bf16, fp16, found 'int4'")


@pytest.mark.parametrize("download", [[], ["--download"]])
def test_what_is_not_here_is_named_and_nobody_waits(folder, download, capsys, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        asked.append(1)
        raise OSError("there is no network")

    asked: list[int] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "no-cache"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    started = time.monotonic()
    given = ["fuse", str(CONCEPT), "--out", str(folder / "x"), "--base", "nobody/nothing"]
    code, error = _run([*given, *download], capsys, monkeypatch)
    assert (
        code == 2
        and f"error: nobody/nothing: {'could not be fetched' if download else 'not in the local cache'}" in error
    )
    assert len(error.strip().splitlines()) == 1 and time.monotonic() - started < 120
    # Not `not asked`: huggingface_hub looks for a list of its own once a day, whatever it was told of the model.
    assert asked if download else "--download" in error


def test_help_names_every_verb():
    shown = subprocess.run([sys.executable, "-m", "mixofshow", "--help"], capture_output=True, text=True, check=True)
    for verb in ("tune", "record", "fuse", "sample", "replay", "evaluate", "inspect", "convert", "demo"):
        assert verb in shown.stdout


def test_exit_codes_are_2_and_3():
    codes = {error.exit_code for error in _leaves(MixOfShowError)}
    assert codes == {2, 3}


def _leaves(error: type[MixOfShowError]) -> list[type[MixOfShowError]]:
    return [error, *(leaf for child in error.__subclasses__() for leaf in _leaves(child))]
