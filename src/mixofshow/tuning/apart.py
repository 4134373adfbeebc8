"""Pictures of unknown origin, read in a child process: a decoder that crashes, or floods the memory, ends only that."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final, Self

from mixofshow.errors import ResourceError, shown
from mixofshow.processes import end_with_parent
from mixofshow.tuning.dataset import Beside, Reading, read_one
from mixofshow.tuning.folder import Finding
from mixofshow.tuning.pictures import label

MEMORY: Final = 4 * 2**30
"""Bytes that the child may take for a picture and its mask; the largest that are read need about half of it."""


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
        return Reading(
            None,
            (
                Finding(
                    label(path), "error", what + (", here or in its mask" if beside.masks or beside.masks_in else "")
                ),
            ),
        )

    def _end(self) -> None:
        if self._child:
            self._child.shutdown()
        self._child = None


def _started(memory: int) -> ProcessPoolExecutor:
    """A child that has imported this module and keeps to its limit. Raises ResourceError."""
    child = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
    try:
        child.submit(_prepare, memory).result()
    except (BrokenProcessPool, OSError) as error:
        raise ResourceError(f"no process can be started to decode pictures in ({shown(error)})") from error
    return child


def _prepare(memory: int) -> None:
    """Limit this process to `memory` more bytes than it has, where the system can (Linux); let Ctrl-C end it quietly."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows; macOS; a lower limit is set already
        import resource

        # Libraries reserve space for each core, so that what is taken at the start differs widely between machines.
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))


def _read(path: Path, beside: Beside) -> Reading:
    """The reading without its example, whose pixels would be copied from process to process for nothing."""
    return dataclasses.replace(read_one(path, beside), example=None)
