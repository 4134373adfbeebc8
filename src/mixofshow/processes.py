"""Child processes that don't outlive those who started them, and don't take all memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def end_with_parent() -> None:
    """From now on this child process ends when its parent is gone, however that was stopped.

    Otherwise it would wait for work for ever. It may end in the midst of a job: what jobs write appears whole or not
    at all.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def handling(number: int, handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Inside, this is what a signal does; nothing changes in another thread than the main one, which may not say that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def deaf_children() -> contextlib.AbstractContextManager[None]:
    """Children that are started inside do not hear Ctrl-C, which would end their imports in a traceback, until they
    listen to it themselves."""
    return handling(signal.SIGINT, signal.SIG_IGN)


def limit_memory(most: int) -> None:
    """Let this process take `most` more bytes than it has, where the system can (Linux)."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows; macOS; a lower limit is set already
        import resource

        # Libraries reserve space for each core, so that what is taken at the start differs widely between machines.
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + most, taken + most))
