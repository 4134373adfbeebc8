"""Processes that Flower starts for apps, one for each message: they log into their owner's folder, and end with it."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Final

APPS_LOG: Final = "apps.log"
EVERY: Final = 0.5
"""Seconds between looks."""


@functools.cache
def begin_app(folder: Path) -> None:
    """In a process that Flower started for an app: keep its log in its owner's folder, and end with whoever started it.

    Flower throws away what apps print; and its own way of ending, at a signal, waits for answers of servers that are gone
    (flwr 1.42), while the app goes on holding its folder, which its successor needs.
    """
    if Path(sys.argv[0]).name in ("flwr-clientapp", "flwr-serverapp"):
        logging.basicConfig(filename=folder / APPS_LOG, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        threading.Thread(target=_end_at_once_with, args=(os.getppid(),), daemon=True).start()


def _end_at_once_with(parent: int) -> None:
    outlive(parent)
    os._exit(1)


def outlive(parent: int) -> None:
    """Wait until this process has lost its parent."""
    while os.getppid() == parent:
        time.sleep(EVERY)
