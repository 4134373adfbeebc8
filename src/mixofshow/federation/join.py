"""A client: a SuperNode of Flower's that takes only our signed app, and the owner's answers at the terminal."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mixofshow.errors import BadInputError, ResourceError, shown
from mixofshow.federation.bundle import TRUSTED
from mixofshow.federation.keys import make_node_key
from mixofshow.federation.launch import (
    always_running,
    app_starter,
    environment,
    free_port,
    last_lines,
    require_flower,
    running,
)
from mixofshow.federation.owner import KEY, ClientSettings, answer, open_questions, save_settings
from mixofshow.outputs import holding
from mixofshow.terminal import say

LOG: Final = "supernode.log"
LOOKS_EVERY: Final = 0.5
NOT_LET_IN: Final = "[code: 2004]"
"""What a SuperNode ends with where its key is not registered, or was in use a minute ago (flwr 1.42)."""
GAVE_UP: Final = "Giving up reconnection"
CUT: Final = "handshake operation timed out"
"""What it says where the center's machine answers and then says no more, as when a network is cut; it does not end then,
but does nothing any more (flwr 1.42)."""
AGAIN_AFTER: Final = 20.0
SuperNode = Callable[[], contextlib.AbstractContextManager[subprocess.Popen[bytes]]]


@contextlib.contextmanager
def running_client(folder: Path, center: str, authority: Path, settings: ClientSettings) -> Iterator[SuperNode]:
    """A client's folder is held while the block lasts; yields what starts its SuperNode. Raises BadInputError."""
    require_flower()
    save_settings(folder, settings)
    make_node_key(folder / KEY)
    with holding(folder) as held:
        if held is False:
            raise BadInputError(f"{folder}: another client runs there")
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


def attend(start: SuperNode, folder: Path, ask: Callable[[str], bool]) -> None:
    """Run the SuperNode, also before its key is admitted, and put its questions to the owner.

    Raises ResourceError for how it ended.
    """
    told = False
    while True:
        with start() as process, (folder / LOG).open(errors="replace") as log:
            log.seek(0, os.SEEK_END)
            heard = ""
            while process.poll() is None and GAVE_UP not in heard:
                for content, question in open_questions(folder).items():
                    answer(folder, content, yes=ask(question))
                time.sleep(LOOKS_EVERY)
                heard = heard[-len(GAVE_UP) :] + log.read()  # a line may come in two parts
        said = last_lines(folder / LOG, 40)
        if NOT_LET_IN in said and not told:
            say(f"the center does not let this client in: its key is not admitted yet; asking every {AGAIN_AFTER:.0f} s")
            told = True
        elif NOT_LET_IN not in said and CUT not in said:
            raise ResourceError(f"the SuperNode ended; {folder / LOG} ends: {shown(last_lines(folder / LOG), 300)}")
        time.sleep(AGAIN_AFTER)
