"""Runs a command of Flower's that ends with whoever started it: `python -m mixofshow.federation.watched COMMAND …`.

Flower's own servers live on when their parent is killed, with their ports and their database.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from importlib.metadata import entry_points

EVERY = 0.5
"""Seconds between looks."""


def main() -> None:
    """Run the command in this process."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    sys.argv = sys.argv[1:]
    (command,) = entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(command.load()())


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10 * EVERY)
    os._exit(1)


if __name__ == "__main__":
    main()
