"""Child processes that don't outlive those who started them."""

from __future__ import annotations

import multiprocessing
import os
import threading


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
