"""A client: a SuperNode of Flower's that takes only our signed app, and the owner's answers at the terminal."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from mixofshow.errors import BadInputError, ResourceError, SettingsError, shown
from mixofshow.federation.apps import APPS_LOG
from mixofshow.federation.bundle import TRUSTED
from mixofshow.federation.keys import AUTHORITY, MAX_KEY_BYTES, checked_host, make_node_key
from mixofshow.federation.launch import (
    always_running,
    app_starter,
    environment,
    free_port,
    last_lines,
    require_flower,
    running,
)
from mixofshow.federation.owner import KEY, ClientSettings, answer, open_questions, save_settings, went_wrong
from mixofshow.outputs import holding
from mixofshow.reading import read_bytes
from mixofshow.terminal import say

LOG: Final = "supernode.log"
LOOKS_EVERY: Final = 0.5
IN: Final = "SuperNode ID:"
"""What a SuperNode says once the center has let it in (all of these: flwr 1.42)."""
NOT_LET_IN: Final = "[code: 2004]"
"""What it ends with where its key is not registered, or was in use a minute ago."""
TURNED_AWAY: Final = "SuperNode terminated gracefully"
"""What it ends with, unasked, where the center does not accept its signature, or no more."""
GAVE_UP: Final = "Giving up reconnection"
CUT: Final = "handshake operation timed out"
"""What it says where the center's machine answers and then says no more, as when a network is cut; it does not end then,
but does nothing any more."""
TOO_LATE: Final = "is not in `RUNNING` status. Ignoring reply"
"""What it says where a round ended before its answer was there."""
AGAIN_AFTER: Final = 20.0
ANSWERS_WITHIN: Final = 10.0
LAST_PORT: Final = 65_535
KEPT: Final = 4000
"""Characters of what it said last that are looked at."""
SuperNode = Callable[[], contextlib.AbstractContextManager[subprocess.Popen[bytes]]]


def look_for(center: str, authority: Path) -> None:
    """Say where nobody answers at the center's address yet; its SuperNode would ask on in silence (flwr 1.42).

    Raises BadInputError for what is no address or no certificate, and where another center answers.
    """
    name, _, port = center.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) <= LAST_PORT:
        raise BadInputError(f"'{shown(center)}': expected the center's address and port, as center.example:8000")
    host = checked_host(name.strip("[]"))
    try:
        trust = ssl.create_default_context(cadata=read_bytes(authority, MAX_KEY_BYTES, BadInputError).decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise BadInputError(f"{authority}: not the center's certificate; its operator has it, as tls/{AUTHORITY}") from error
    try:
        with socket.create_connection((host, int(port)), ANSWERS_WITHIN) as line:
            trust.wrap_socket(line, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        why = shown(error.verify_message)
        raise BadInputError(f"{center}: not the center of {authority}, or known by another name ({why})") from error
    except OSError as error:
        say(f"nobody answers at {center} yet ({shown(error.strerror or error)}); asking again and again")


@contextlib.contextmanager
def running_client(folder: Path, center: str, authority: Path, settings: ClientSettings) -> Iterator[SuperNode]:
    """A client's folder is held while the block lasts; yields what starts its SuperNode. Raises BadInputError."""
    require_flower()
    folder.mkdir(parents=True, exist_ok=True)
    with holding(folder) as held:
        if held is False:
            raise BadInputError(f"{folder}: another client runs there")
        save_settings(folder, settings)
        make_node_key(folder / KEY)
        port, env, log = free_port(), environment(folder), folder / LOG
        with always_running(app_starter(f"127.0.0.1:{port}", "--insecure"), env, log):
            yield functools.partial(running, supernode(folder, center, authority, port), env, log)


def supernode(folder: Path, center: str, authority: Path, port: int) -> list[str]:
    """Flower's command. Raises BadInputError for a folder whose name Flower cannot be told."""
    place = str(folder.absolute())
    if '"' in place or "\\" in place:
        raise BadInputError(f"{shown(folder)}: Flower takes no folder whose name holds a quote or backslash")
    return [
        *("flower-supernode", "--superlink", center, "--root-certificates", str(authority.absolute())),
        *("--auth-supernode-private-key", str(folder.absolute() / KEY), "--trusted-entities", str(TRUSTED)),
        *("--host", "127.0.0.1", "--port", str(port), "--isolation", "process"),
        *("--node-config", f"folder={json.dumps(place, ensure_ascii=False)}"),
    ]


def attend(start: SuperNode, folder: Path, ask: Callable[[str], bool | None]) -> None:
    """Run the SuperNode, also before its key is admitted and when it is killed, and put its questions to the owner.

    `ask` is called until it gives an answer; it does not wait for one, while the SuperNode may end.

    Raises BadInputError for a client that the center wants no more, ResourceError for any other end.
    """
    told = turned_away = False
    went_wrong(folder)  # at an earlier start, which said so
    (folder / LOG).touch()
    with (folder / LOG).open(errors="replace") as log:
        while True:
            log.seek(0, os.SEEK_END)
            with start() as process:
                said, code = _listen(process, log, folder, ask)
            if NOT_LET_IN in said:
                if turned_away:
                    raise BadInputError("the center has expelled this client: its key is on the list no more")
                if not told:
                    say(
                        "the center does not let this client in: its key is not admitted yet, or was in use a minute ago; "
                        f"asking every {AGAIN_AFTER:.0f} s"
                    )
                told = True
            elif TURNED_AWAY in said and IN not in said:
                raise BadInputError("the center does not accept this client's signature; is this machine's clock right?")
            elif (turned_away := TURNED_AWAY in said) or CUT in said or (code or 0) < 0:
                pass  # its center may know it under another number now; or its network was cut; or it was killed
            else:
                raise ResourceError(f"the SuperNode ended; {folder / LOG} ends: {shown(last_lines(folder / LOG), 300)}")
            time.sleep(AGAIN_AFTER)


def _listen(
    process: subprocess.Popen[bytes], log: IO[str], folder: Path, ask: Callable[[str], bool | None]
) -> tuple[str, int | None]:
    """What a SuperNode said at last, and its exit code, or None where it lives on in vain."""
    said, was_in = "", False
    while (code := process.poll()) is None and GAVE_UP not in said:
        for content, question in list(open_questions(folder).items())[:1]:  # one after another
            if (yes := ask(question)) is not None:
                answer(folder, content, yes=yes)
        if wrong := went_wrong(folder):
            say(f"the center did not get what it asked for: {wrong}; {folder / APPS_LOG} says more")
        time.sleep(LOOKS_EVERY)
        new = log.read()
        if TOO_LATE in new:
            say("a round ended without this client's answer, which is kept for the next one")
        said = said[-KEPT:] + new  # a line may come in two parts
        was_in = was_in or IN in said
    return said + log.read() + IN * was_in, code


def asker(read: Callable[[], str | None]) -> Callable[[str], bool | None]:
    """Puts each question once, until a line that `read` gives is an answer; what was typed before it is none."""
    put = ""

    def ask(question: str) -> bool | None:
        nonlocal put
        line = read()
        if question != put:
            put, line = question, None
            say(f"{question} [y/N]:")
        if line is None:
            return None
        return line.strip().lower() in ("y", "yes")

    return ask


def typed() -> str | None:
    """A line that was typed at the terminal, if there is one. Raises SettingsError where nobody can type."""
    if sys.platform != "win32" and not select.select([sys.stdin], [], [], 0)[0]:  # there nobody can tell
        return None
    if not (line := sys.stdin.readline()):
        raise SettingsError("`approve` ask: nobody can answer, standard input is closed; always sends without asking")
    return line
