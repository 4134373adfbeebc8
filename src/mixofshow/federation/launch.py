"""Starting Flower's programs: nothing is told to anyone, nothing is installed, and they end with us."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from mixofshow.errors import SettingsError

QUIET: Final = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Flower counts its users and looks for newer versions, unless told not to (flwr 1.42)."""
ENDS_WITHIN: Final = 10.0
"""Seconds that a program has to end in good order."""
LOOKS_EVERY: Final = 0.5


def require_flower() -> None:
    """Raise SettingsError where Flower is missing."""
    try:
        import flwr  # noqa: F401
    except ImportError as error:
        raise SettingsError("federation needs Flower, which is not installed; pip install 'mixofshow[federated]'") from error


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What Flower's programs see: a home of their own, and the programs of this installation first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": str((folder / "flower").absolute()), **more}


@contextlib.contextmanager
def running(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command of Flower's, which writes into a log, while the block lasts."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "mixofshow.federation.watched", *command],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to hear
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def always_running(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[None]:
    """The same, started again whenever it ends by itself."""
    over = threading.Event()

    def keep() -> None:
        while not over.is_set():
            with running(command, env, log) as process:
                while not over.wait(LOOKS_EVERY) and process.poll() is None:
                    pass

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def app_starter(address: str, *trust: str) -> list[str]:
    """Flower's command that starts apps, as a SuperLink or SuperNode at this address asks for.

    It ends at the first answer that it does not expect, such as that a database is locked, and a program that started it
    itself would not start it again (flwr 1.42); so it is ours to start (`--isolation process`), and to keep running.
    """
    return ["flower-superexec", "--runtime-api-address", address, *trust]


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as one:
        one.bind((host, 0))
        port: int = one.getsockname()[1]
        return port


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log, in one line."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " | ".join(line.strip() for line in lines[-count:])
