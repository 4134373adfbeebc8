"""A stranger's suite, its pictures.json, and what people answered. Covers F11, F12, F14, F22, F23, F27, F40."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mixofshow.cli import app
from mixofshow.errors import BadInputError, SettingsError
from mixofshow.evaluation.study import build_study
from mixofshow.evaluation.suite import make_suite, suite_of_files

ROW = [{"prompt": "a cat", "pictures": ["0.png", "1.png"]}]
STATES = {"single": {"cat": ROW}, "fused": {"cat": ROW}}
INDEX = {"references": {"cat": "cat"}, "methods": {"ours": STATES, "theirs": STATES}}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """What a suite writes, as small as it can be."""
    folder = tmp_path / "suite"
    (folder / "cat").mkdir(parents=True)
    for path in (folder / "0.png", folder / "1.png", folder / "cat" / "0.png", tmp_path / "private.png"):
        Image.new("RGB", (32, 32), "red" if path.parent == tmp_path else "blue").save(path)
    return folder


def study(folder: Path, table: dict[str, Any], **options: Any) -> str:
    (folder / "pictures.json").write_text(json.dumps(table))
    build_study(folder, ["ours,theirs"], folder / "page.html", count=2, **options)
    return (folder / "page.html").read_text()


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    table = json.loads(json.dumps(INDEX))
    change(table)
    return table


UNEQUAL: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no fused pictures": (lambda it: it["methods"]["ours"].pop("fused"), "ours: expected its fused pictures of"),
    "no single pictures": (lambda it: it["methods"]["ours"].pop("single"), "ours: expected its single pictures of"),
    "a concept less": (lambda it: it["methods"]["theirs"]["fused"].pop("cat"), "theirs: expected its fused pictures"),
    "a reference more": (lambda it: it["references"].update(dog="dog"), "ours: expected its single pictures of"),
    "another prompt": (lambda it: it["methods"]["theirs"]["fused"]["cat"][0].update(prompt="x"), "other prompts"),
    "a picture less": (lambda it: it["methods"]["theirs"]["fused"]["cat"][0]["pictures"].pop(), "numbers of pictures"),
    "a prompt more": (lambda it: it["methods"]["theirs"]["fused"]["cat"].append(ROW[0]), "other prompts, or numbers"),
    "another state": (lambda it: it["methods"]["ours"].update(half={}), "'methods.ours.half"),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_methods_that_were_not_asked_the_same_are_named(name, suite):
    change, message = UNEQUAL[name]
    with pytest.raises(BadInputError, match=message):
        study(suite, changed(change))


LEADING_OUT: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "an absolute picture": lambda it, private: _pictures(it, str(private)),
    "a picture above": lambda it, private: _pictures(it, "../private.png"),
    "a picture around": lambda it, private: _pictures(it, "cat/../../private.png"),
    "a link": lambda it, private: _pictures(it, "link.png"),
    "absolute references": lambda it, private: it["references"].update(cat=str(private.parent)),
    "references above": lambda it, private: it["references"].update(cat=".."),
}


def _pictures(table: dict[str, Any], path: str) -> None:
    for states in table["methods"].values():
        states["fused"]["cat"][0]["pictures"] = [path, path]


@pytest.mark.parametrize("name", LEADING_OUT)
def test_pictures_from_elsewhere_are_not_shown_unless_told_so(name, suite):
    private = suite.parent / "private.png"
    (suite / "link.png").symlink_to(private)
    table = changed(lambda it: LEADING_OUT[name](it, private))
    with pytest.raises(BadInputError, match="lies outside of the folder; `outside`"):
        study(suite, table)
    assert not (suite / "page.html").exists()
    assert "data:image/png" in study(suite, table, outside=True)


@pytest.mark.parametrize("path", ["a\x1b[31m.png", "\ud800", "\0", "x" * 5000])
def test_odd_paths_are_one_line(path, suite):
    with pytest.raises(BadInputError) as error:
        study(suite, changed(lambda it: _pictures(it, path)))
    assert str(error.value).isprintable()


def test_no_prompt_ends_the_page_or_hides_its_script(suite):
    prompt = "<!--<script> </script> ]]> --> <b>"
    rows = {"single": {"cat": [{**ROW[0], "prompt": prompt}]}, "fused": {"cat": [{**ROW[0], "prompt": prompt}]}}
    page = study(suite, {**INDEX, "methods": {"ours": rows, "theirs": rows}})
    (data,) = [part.split("</script>")[0] for part in page.split('id="study">')[1:]]
    assert "<" not in data
    assert json.loads(data)["items"][0]["prompt"] == prompt


def test_names_colour_no_table_of_answers(tmp_path):
    names = ["[/nope]", "[bold]\x1b[31m"]
    answer = {"item": 0, "left": names[0], "right": names[1], "image": names[0], "text": names[1]}
    table = {"schema": 1, "study": "s", "rater": "a", "items": 1, "answers": [answer]}
    (tmp_path / "a.json").write_text(json.dumps(table))
    done = CliRunner().invoke(app, ["study", "score", str(tmp_path / "a.json")], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "[/nope]" in done.output and r"[bold]\x1b[31m" in done.output


CONCEPT = {"name": "cat", "kind": "character", "class_word": "cat", "folder": "cat"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fuse": {"options": 5}}, "'options'"),
        ({"methods": [{"tuning": "lora", "fusion": "average", "fuse": {"options": [1]}}]}, "'options'"),
        ({"methods": [{"tuning": "lora", "fusion": "average", "tune": {"unet": 5}}]}, "'unet'"),
        ({"tune": {"a." * 5000: 1}}, "unknown key 'a"),
        ({"tune": {f"a{number}": 1 for number in range(1000)}}, "and 997 more"),
        ({"fuse": 5}, "'fuse'"),
    ],
)
def test_settings_within_a_suite_are_checked(changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        make_suite({"concepts": [CONCEPT], "methods": ["lora+average"], **changes})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("pair", ["a.safetensors=", "=folder", "="])
def test_a_pair_needs_both(pair):
    with pytest.raises(SettingsError, match="expected FILE=FOLDER"):
        suite_of_files([pair])
