"""What the documentation tells its readers to type is run, page by page, as a reader would.

A page's shell and Python blocks run in order in a fresh folder that holds `examples/`, the Python in one namespace. A
block that cannot be run has a comment right above it, `<!-- not run: reason -->`. A block that is opened by
`yaml title="file.yaml"` is written to that file. What readers bring along is in GIVEN; `hurried` cuts work short.
"""

from __future__ import annotations

import glob
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from mixofshow import cli, fuse
from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.evaluation import suite_settings, tasks
from mixofshow.fusion.methods import METHODS
from mixofshow.fusion.settings import FusionSettings
from mixofshow.sampling import inputs
from mixofshow.tuning.settings import BASE_PRESETS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "emojiland/*.md", "src/mixofshow/bases/emojiland/**/*.md")
    for path in ROOT.glob(pattern)
)
QUICK = ("README.md",)
"""Pages that are run every time; the others are slow."""
KINDS = {"sh", "python", "yaml", "json", "text"}
REASON = re.compile(r"<!-- not run: (\S.{8,}) -->\s*")
TITLE = re.compile(r'title="([\w.-]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block, why it is not run (if it is not), and the file that it shows (if it does)."""

    page: str
    line: int
    kind: str
    text: str
    reason: str | None
    file: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """All blocks of code of a page, in order; an indented one has no kind."""
    tokens = MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8"))
    return list(_blocks(page, tokens))


def _blocks(page: str, tokens: list) -> Iterator[Block]:
    for before, token in pairwise(tokens):
        if token.type in ("fence", "code_block"):
            kind, _, more = token.info.partition(" ")
            reason = REASON.fullmatch(before.content) if before.type == "html_block" else None
            title = TITLE.fullmatch(more)
            yield Block(page, token.map[0] + 1, kind, token.content, reason and reason[1], title and title[1])


ALL = [block for page in PAGES for block in blocks_of(page)]
RUN = [
    page for page in PAGES if any(one.page == page and one.kind in ("sh", "python") and not one.reason for one in ALL)
]


# What every page obeys.


@pytest.mark.parametrize("block", ALL, ids=str)
def test_a_block_says_what_it_is_and_can_be_read_as_that(block: Block) -> None:
    assert block.kind in KINDS
    if block.kind == "python":
        compile(block.text, str(block), "exec")
    elif block.kind == "yaml":
        yaml.safe_load(block.text)
    elif block.kind == "json":
        json.loads(block.text)


@pytest.mark.parametrize("page", PAGES)
def test_every_reason_for_not_running_stands_above_a_block(page: str) -> None:
    comments = (ROOT / page).read_text(encoding="utf-8").count("<!-- not run")
    quoted = sum(one.text.count("<!-- not run") for one in blocks_of(page))
    assert comments - quoted == sum(one.reason is not None for one in blocks_of(page))


@pytest.mark.parametrize("block", [one for one in ALL if one.kind == "sh" and "mixofshow " in one.text], ids=str)
def test_the_command_line_knows_every_option(block: Block) -> None:
    commands = typer.main.get_command(cli.app).commands
    for line in lines_of(block.text):
        program, *words = shlex.split(line, comments=True)
        if program == "mixofshow" and words[0] in commands:
            commands[words[0]].make_context(words[0], [word for word in words[1:] if word != ">"])


# Running them.


def _folder_of_pictures(folder: Path) -> None:
    write_concept("reddog", folder / "written")
    shutil.copytree(folder / "written" / "train", folder / "mydog")
    for caption in (folder / "mydog").glob("*.txt"):
        caption.write_text(caption.read_text().replace("<reddog>", "<mydog>"))


def _mask(folder: Path) -> None:
    sea = Image.new("L", (160, 64))
    sea.paste(255, (0, 40, 160, 64))
    sea.save(folder / "sea.png")
    _sketch(folder)


def _sketch(folder: Path) -> None:
    sketch = Image.new("RGB", (64, 64))
    sketch.paste("white", (16, 16, 48, 56))
    sketch.save(folder / "sketch.png")


GIVEN: dict[str, Callable[[Path], None]] = {
    "docs/own-concept.md": _folder_of_pictures,
    "docs/tuning.md": _folder_of_pictures,
    "docs/sampling.md": _mask,
    "docs/controls.md": _sketch,
}
"""What a page's readers have already."""
SUITE = {"tune": {"steps": 2}, "fuse": {"steps": 2}, "images_per_prompt": 1, "prompts_per_category": 1}
"""Goes over the suites in `examples/`, which are a matter of minutes and hours."""


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything does two steps: tuning, what fusion draws, what is drawn. Fusion does not refine.

    Of Emojiland's concepts only those that the pages name are written; they are drawn on one prompt of each category.
    """
    few = {"steps": 2, "refine": 0}
    settings, prompts_of = inputs.SamplingSettings, suite_settings.Suite.prompts_of
    monkeypatch.setitem(BASE_PRESETS["emojiland"], "steps", 2)
    monkeypatch.setattr(inputs, "SamplingSettings", lambda **table: settings(**{**table, "steps": 2}))
    monkeypatch.setattr("mixofshow.bases.emojiland.concepts.ALL", ("reddog", "clown", "steamtrain", "robot"))
    monkeypatch.setattr(
        suite_settings.Suite,
        "prompts_of",
        lambda suite, kind: {key: prompts[:1] for key, prompts in prompts_of(suite, kind).items()},
    )

    def quickly(concepts: Any, base: Any, settings: FusionSettings | None = None, **more: Any) -> Any:
        return fuse(concepts, base, (settings or FusionSettings()).model_copy(update=few), **more)

    monkeypatch.setattr("mixofshow.fusion.stages.fuse", quickly)
    monkeypatch.setattr(tasks, "fuse", quickly)
    with patch.dict(METHODS):  # a page shows how to enter one
        yield


ADDED = {"record": ["--steps", "2"], "evaluate": ["--images", "1", "--workers", "1"]}
"""Options that do the same where it is easier so. One process, because others would not be hurried."""


@pytest.mark.filterwarnings("default")  # other libraries' warnings are no errors to a reader either
@pytest.mark.parametrize("page", [pytest.param(page, marks=() if page in QUICK else pytest.mark.slow) for page in RUN])
def test_a_page_can_be_followed(page: str, tmp_path: Path, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for suite in (tmp_path / "examples" / "suites").iterdir():
        table = yaml.safe_load(suite.read_text()) | SUITE
        suite.write_text(yaml.safe_dump(table | {"compositions": table["compositions"] | {"images": 1}}))
    monkeypatch.chdir(tmp_path)
    GIVEN.get(page, lambda folder: None)(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        if block.reason:
            continue
        if block.kind == "python":
            exec(compile(block.text, str(block), "exec"), namespace)
        elif block.kind == "sh":
            for line in lines_of(block.text):
                run_line(line, monkeypatch)


def lines_of(script: str) -> list[str]:
    """Commands of a script, one a line, those continued by a backslash joined."""
    return [line for line in script.replace("\\\n", " ").splitlines() if line.strip()]


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command: our own in this process, which has everything imported; any other by bash."""
    words = [name for word in shlex.split(line, comments=True) for name in sorted(glob.glob(word)) or [word]]
    if words[0] == "mixofshow" and ">" not in words:
        monkeypatch.setattr(sys, "argv", [*words, *ADDED.get(words[1], [])])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, line
    elif words[:2] == ["python", "-m"]:
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(words[2], run_name="__main__")
        assert not ended.value.code, line
    else:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(["bash", "-ec", line], check=True, env=environment)
