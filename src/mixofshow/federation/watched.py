"""Runs a command of Flower's that ends with whoever started it: `python -m mixofshow.federation.watched COMMAND …`.

Flower's own servers live on when their parent is killed, with their ports and their database.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any, Final

from mixofshow.federation.apps import outlive
from mixofshow.processes import end_with_parent

LET_END: Final = 5.0
"""Seconds that a command has to end by itself."""
LOCKED_FOR: Final = 120.0
"""Seconds that Flower's database may be locked by another."""
TRIES: Final = 30
"""How often an app asks for a part of its message, the first ones after 1, 2, 4, 8 seconds, all others after 10."""
APPS_IMPORT: Final = ("flwr.supernode.cli", "mixofshow.federation.rounds", "mixofshow.fusion.stages", "mixofshow.tuning.trainer")


def main() -> None:
    """Run the command in this process."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    sys.argv = sys.argv[1:]
    be_patient_with_the_database()
    if sys.argv[0] == "flower-superexec" and sys.platform == "linux":  # elsewhere a fork may not survive what is imported
        fork_apps()
    _run()


def _run() -> None:
    (command,) = entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(command.load()())


def fork_apps() -> None:
    """Flower starts a new Python for each message (flwr 1.42), and torch with all around it takes seconds to import.

    Here each app is forked from a process that has imported it.
    """
    from flwr.supercore.superexec.executor import subprocess_executor

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(APPS_IMPORT))

    def start(command: Sequence[str], **_: Any) -> None:
        context.Process(target=_app, args=(command,)).start()

    subprocess_executor.subprocess = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)


def _app(command: Sequence[str]) -> None:
    end_with_parent()  # which is what starts apps; the process that this one was forked from lives as long as any fork
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(silence, stream.fileno())
    sys.argv = list(command)
    give_up_on_what_never_comes()
    _run()


def give_up_on_what_never_comes() -> None:
    """Parts of a message whose center was killed never come; an app waits an hour for them, and all later messages for it.

    (flwr 1.42.)
    """
    from flwr.supercore.inflatable import inflatable_utils

    usual = inflatable_utils.pull_and_inflate_object_from_tree.__kwdefaults__
    usual["max_tries_per_object"] = min(usual["max_tries_per_object"], TRIES)


def be_patient_with_the_database() -> None:
    """On a slow machine Flower's five seconds for a lock are not enough, and then its programs fail (flwr 1.42)."""
    from flwr.supercore import sql_mixin

    sql_mixin.SQLITE_PRAGMAS = (*sql_mixin.SQLITE_PRAGMAS, ("busy_timeout", f"{LOCKED_FOR * 1000:.0f}"))


def _end_with(parent: int) -> None:
    outlive(parent)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LET_END)
    os._exit(1)


if __name__ == "__main__":
    main()
