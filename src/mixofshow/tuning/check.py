"""`mixofshow check`: everything of a folder is decoded, and what is wrong with it is listed, before any training."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final, Self, Unpack

from mixofshow.concepts.syntax import ANY_WORD
from mixofshow.errors import DatasetError, ResourceError, shown
from mixofshow.images import label
from mixofshow.outputs import write_text
from mixofshow.processes import deaf_children, end_with_parent, limit_memory
from mixofshow.terminal import as_options, print_table, say
from mixofshow.tuning.dataset import Beside, FolderOptions, Reading, read_one, readings
from mixofshow.tuning.folder import Finding

COLOURS: Final = {"error": "red", "warning": "yellow", "note": "default"}
MEMORY: Final = 4 * 2**30
"""Bytes that the child may take for a picture and its mask; the largest that are read need about half of it."""


def check_folder(folder: Path, **options: Unpack[FolderOptions]) -> list[Finding]:
    """What there is to say about a folder's pictures, captions and masks, in the pictures' order; nothing is changed.

    Empty if all of it is used as it is. With `naming`, captions that do not name the concept are errors; without it,
    whether any of them names one is all that can be said. Pictures are decoded in a child process: one that crashes
    the decoder, or takes too much memory, is an error like any other. Raises DatasetError if there is no such folder or
    no picture in it.
    """
    with ChildReader() as child:
        every = list(readings(folder, child.read, **options))
    unnamed = [reading.caption for reading in every if reading.caption and not ANY_WORD.search(reading.caption)]
    found = [finding for reading in every for finding in reading.findings]
    if unnamed and options.get("naming") is None:
        what = (
            f"no <name> in {len(unnamed)} of them, such as '{shown(unnamed[0])}': it takes the place of the class word; "
            "give `name` and `class_word` to see whether that is there"
        )
        found.append(Finding("captions", "note", what))
    return found


class ChildReader:
    """Reads pictures in a child process, which starts with the first one, and anew after one that it did not survive."""

    def __init__(self) -> None:
        self._child: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def read(self, path: Path, beside: Beside) -> Reading:
        """What `read_one` finds, without the example; an error of the picture's if the child does not survive it."""
        child = self._child = self._child or _started(MEMORY)
        try:
            return child.submit(_read, path, beside).result()
        except BrokenProcessPool:
            what = "the decoder crashed"
        except MemoryError:
            what = f"the decoder needs more than {MEMORY / 2**30:.3g} GB of memory"
        self._end()  # also after a MemoryError: who knows what the decoder has left behind
        where = ", here or in its mask" if beside.masks or beside.masks_in else ""
        return Reading(None, (Finding(label(path), "error", what + where),))

    def _end(self) -> None:
        if self._child:
            self._child.shutdown()
        self._child = None


def _started(memory: int) -> ProcessPoolExecutor:
    """A child that has imported this module and keeps to its limit. Raises ResourceError."""
    child = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
    try:
        with deaf_children():
            ready = child.submit(_prepare, memory)
        ready.result()
    except (BrokenProcessPool, OSError) as error:
        raise ResourceError(f"no process can be started to decode pictures in ({shown(error)})") from error
    return child


def _prepare(memory: int) -> None:
    """Limit this process to `memory` more bytes than it has, where the system can; let Ctrl-C end it quietly."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    limit_memory(memory)


def _read(path: Path, beside: Beside) -> Reading:
    """The reading without its example, whose pixels would be copied from process to process for nothing."""
    return dataclasses.replace(read_one(path, beside), example=None)


def report(findings: Sequence[Finding], json_file: Path | None = None) -> None:
    """Print the findings as a table, and write them as JSON if asked to. Raises DatasetError if one is an error."""
    if findings:
        rows = [(one.file, (one.level, COLOURS[one.level]), as_options(one.message)) for one in findings]
        print_table(("file", "", "what"), rows)
    else:
        say("nothing to say: every picture is used as it is")
    if json_file:
        table = {"findings": [dataclasses.asdict(finding) for finding in findings]}
        write_text(json_file, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    if bad := sorted({finding.file for finding in findings if finding.level == "error"}):
        count = f"{len(bad)} files cannot be used" if len(bad) > 1 else f"{bad[0]} cannot be used"
        raise DatasetError(f"{count}; repair what the table names, or leave it out with `skip_bad`")
