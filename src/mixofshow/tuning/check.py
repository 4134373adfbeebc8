"""`mixofshow check`: everything of a folder is decoded, and what is wrong with it is listed, before any training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mixofshow.errors import DatasetError, shown
from mixofshow.outputs import write_text
from mixofshow.terminal import print_table, say
from mixofshow.tuning.apart import ChildReader
from mixofshow.tuning.dataset import readings
from mixofshow.tuning.folder import Finding
from mixofshow.tuning.naming import ANY_WORD, Naming
from mixofshow.tuning.pictures import Alpha

COLOURS: Final = {"error": "red", "warning": "yellow", "note": "default"}


def check_folder(
    folder: Path,
    *,
    masks: Path | None = None,
    instance_prompt: str = "the instance prompt",
    alpha: Alpha = "fill",
    background: str = "white",
    naming: Naming | None = None,
) -> list[Finding]:
    """What there is to say about a folder's pictures, captions and masks, in the pictures' order; nothing is changed.

    Empty if all of it is used as it is. With `naming`, captions that do not name the concept are errors; without it,
    whether any of them names one is all that can be said. Pictures are decoded in a child process: one that crashes the decoder, or takes
    too much memory, is an error like any other. Raises DatasetError if there is no such folder or no picture in it.
    """
    with ChildReader() as child:
        every = list(
            readings(
                folder,
                instance_prompt=instance_prompt,
                masks=masks,
                alpha=alpha,
                background=background,
                naming=naming,
                read=child.read,
            )
        )
    unnamed = [reading.caption for reading in every if reading.caption and not ANY_WORD.search(reading.caption)]
    found = [finding for reading in every for finding in reading.findings]
    if unnamed and naming is None:
        what = (
            f"no <name> in {len(unnamed)} of them, such as '{shown(unnamed[0])}': it takes the place of the class word; "
            "--name and --class-word tell whether that is there"
        )
        found.append(Finding("captions", "note", what))
    return found


def report(findings: Sequence[Finding], json_file: Path | None = None) -> None:
    """Print the findings as a table, and write them as JSON if asked to. Raises DatasetError if one is an error."""
    print_findings(findings)
    if json_file:
        table = {"findings": [dataclasses.asdict(finding) for finding in findings]}
        write_text(json_file, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    if bad := sorted({finding.file for finding in findings if finding.level == "error"}):
        count = f"{len(bad)} files cannot be used" if len(bad) > 1 else f"{bad[0]} cannot be used"
        raise DatasetError(f"{count}; repair what the table names, or leave it out with --skip-bad")


def print_findings(findings: Sequence[Finding]) -> None:
    """The table of findings, one row each, on standard output; a line if there are none."""
    if not findings:
        say("nothing to say: every picture is used as it is")
        return
    print_table(("file", "", "what"), [(one.file, (one.level, COLOURS[one.level]), one.message) for one in findings])
