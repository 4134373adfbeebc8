"""Jobs one after the other, or in several processes at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from mixofshow.errors import ResourceError, SettingsError
from mixofshow.processes import end_with_parent

Each = Callable[[Callable[[Any], None], Sequence[Any]], Iterator[Any]]
"""Does every job and yields it when it is done, in any order."""


@contextlib.contextmanager
def workforce(workers: int) -> Iterator[Each]:
    """So many processes while inside; 1 is this process itself. Raises SettingsError, ResourceError."""
    if workers < 1:
        raise SettingsError(f"workers: expected at least 1, found {workers}")
    if workers == 1:
        yield _one_by_one
        return
    # Forked processes would share locks of torch's threads, and hang.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(workers,))

    def each(function: Callable[[Any], None], jobs: Sequence[Any]) -> Iterator[Any]:
        running = {pool.submit(function, job): job for job in jobs}
        for future in as_completed(running):
            future.result()
            yield running[future]

    try:
        yield each
    except BrokenProcessPool as error:
        raise ResourceError("a worker was killed, probably for want of memory; run again with fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(function: Callable[[Any], None], jobs: Sequence[Any]) -> Iterator[Any]:
    for job in jobs:
        function(job)
        yield job


def _start(workers: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    torch.set_flush_denormal(True)
    end_with_parent()
