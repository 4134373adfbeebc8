"""The documentation site: it builds without a complaint, asks nobody else for anything, and its figures are measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import mixofshow

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_from_outside_docs_are_there(site: Path) -> None:
    assert "Teach a text-to-image model" in (site / "index.html").read_text(encoding="utf-8")
    assert {"changelog.html", "contributing.html", "emojiland.html"} <= {path.name for path in site.iterdir()}
    assert not (site / "hooks.py").exists()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = [f"{path.name}: {url}" for path in site.rglob("*.html") for url in loads(path.read_text(encoding="utf-8"))]
    assert [entry for entry in loaded if "//" in entry] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", styles) == []


class Loads(HTMLParser):
    """Addresses that a browser fetches by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("next", "prev", "canonical"):
            self.found.append(given["href"] or "")
        self.found += [given[name] or "" for name in ("src", "srcset") if name in given]


def loads(page: str) -> list[str]:
    """Those of one page."""
    parser = Loads()
    parser.feed(page)
    return parser.found


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_figures_on_the_page_of_benchmarks_are_those_measured(path: Path) -> None:
    sections = [part for part in BENCHMARKS.split("\n## ") if path.name in part]
    assert len(sections) == 1, "each file of results has a section that names it"
    cells = re.findall(r"(?<=\| )\d+\.\d+(?= \|)", sections[0])
    measured = list(numbers(json.loads(path.read_text(encoding="utf-8"))))
    assert cells
    assert [cell for cell in cells if not any(is_rounded(cell, number) for number in measured)] == []


def numbers(value: object) -> Iterator[float]:
    """All numbers in JSON."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield float(value)


def is_rounded(cell: str, number: float) -> bool:
    """Is this what the number is, to so many digits?"""
    digits = len(cell.partition(".")[2])
    return abs(float(cell) - number) <= 0.5 * 10**-digits + 1e-9


def test_the_page_of_the_python_interface_has_all_of_it():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert {name for name in mixofshow.__all__ if f"::: mixofshow.{name}\n" not in page} == {"MixOfShowError"}
    assert "::: mixofshow.errors\n" in page
