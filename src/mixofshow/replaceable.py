"""What may be replaced: our files of the kind that takes their place, and folders that hold nothing but what we wrote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MARK: Final = "mixofshow"
"""What pictures and pages of ours say of who made them; a note in a picture is called so too."""
SOFTWARE: Final = "Software"
"""What PNG calls that."""
COMPOSITION: Final = "# A composition of mixofshow: "
SETTINGS: Final = "# Settings of mixofshow: "
"""How the first lines of our YAML begin; the rest says which command reads it."""
KINDS: Final = {
    "safetensors": rb'.{3}\0{5}\{"__metadata__":\{"format":"pt","mixofshow',  # a header of at most 8 MB
    "PNG": rb"\x89PNG.{29}.{4}(tEXt|iTXt)(Software\0)?mixofshow",  # behind the size, the first that is said
    "HTML": rb'(?i)\s*<!doctype html>.{,80}<meta name="generator" content="mixofshow">',
    "JSON": rb'\s*(\{\s*(\}|"findings":\s*\[|"image_alignment":\s*\{\s*"lower_bound"|"schema":\s*\d+,\s*"concepts"|'
    rb'"references":\s*\{|"seconds":\s*[\d.]+,\s*"peak_memory_mb")|\[\s*(\]|\{\s*"pair":))',
    "YAML": COMPOSITION.encode(),
    "settings": SETTINGS.encode(),
    "CSV": rb"method,measure,over,state,value,low,high\n",
    "checkpoint": rb"PK\x03\x04.{,60}archive/data\.pkl.{,80}step.{,20}identity",
}
"""Kinds of files that we write, and how those of each begin that are ours: others write such files too."""
LONGEST_START: Final = 300
LISTING: Final = ".mixofshow-files.json"
"""In a folder that we wrote: its files with their sizes in bytes."""
DROPPINGS: Final = {LISTING, ".DS_Store", "Thumbs.db", "desktop.ini"}
"""Files that systems leave in folders; nobody misses them."""


def kind_of(path: Path) -> str | None:
    """Which of KINDS a file is by its beginning, whatever its name says; None: not one that we wrote."""
    start = _start(path, LONGEST_START)
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, start, re.DOTALL)), None)


def is_in_the_way(path: Path, kind: str | None) -> bool:
    """Whether a file is there, with something in it, that is none of ours of this kind."""
    return bool(_start(path, 1)) and kind_of(path) != kind


def list_files(folder: Path) -> None:
    """Write into a folder what is in it, so that it can be told later whether there is more."""
    (folder / LISTING).write_text(json.dumps({"files": dict(sorted(_sizes(folder)))}, indent=1) + "\n", "utf-8")


def strangers(folder: Path) -> list[str]:
    """Files in a folder, by their path in it, that we did not write, or that others have changed since."""
    found = dict(_sizes(folder))
    try:
        written = json.loads((folder / LISTING).read_bytes())["files"]
        return sorted(name for name, size in found.items() if written.get(name) != size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return sorted(found)


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Everything in a folder that is no folder itself, by its path in it."""
    for root, folders, names in os.walk(folder):
        for name in (*names, *(one for one in folders if Path(root, one).is_symlink())):
            if name not in DROPPINGS:
                path = Path(root, name)
                yield path.relative_to(folder).as_posix(), path.lstat().st_size


def _start(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""
