"""A client: a SuperNode of Flower's that takes only our signed app, and the owner's answers at the terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from mixofshow.errors import BadInputError, ResourceError, shown
from mixofshow.federation.bundle import TRUSTED
from mixofshow.federation.keys import make_node_key
from mixofshow.federation.launch import environment, free_port, last_lines, require_flower, running
from mixofshow.federation.owner import KEY, ClientSettings, answer, open_questions, save_settings
from mixofshow.outputs import holding

LOG: Final = "supernode.log"
LOOKS_EVERY: Final = 0.5


@contextlib.contextmanager
def running_client(folder: Path, center: str, authority: Path, settings: ClientSettings) -> Iterator[Any]:
    """A client, while the block lasts; yields its SuperNode's process. Raises BadInputError."""
    require_flower()
    save_settings(folder, settings)
    make_node_key(folder / KEY)
    with holding(folder) as held:
        if held is False:
            raise BadInputError(f"{folder}: another client runs there")
        with running(supernode(folder, center, authority), environment(folder), folder / LOG) as process:
            yield process


def supernode(folder: Path, center: str, authority: Path) -> list[str]:
    """Flower's command. Raises BadInputError for a folder whose name Flower cannot be told."""
    place = str(folder.absolute())
    if '"' in place or "\\" in place:
        raise BadInputError(f"{shown(folder)}: Flower takes no folder whose name holds a quote or backslash")
    return [
        *("flower-supernode", "--superlink", center, "--root-certificates", str(authority.absolute())),
        *("--auth-supernode-private-key", str(folder.absolute() / KEY), "--trusted-entities", str(TRUSTED)),
        *("--host", "127.0.0.1", "--port", str(free_port()), "--node-config", f"folder={json.dumps(place, ensure_ascii=False)}"),
    ]


def attend(process: Any, folder: Path, ask: Callable[[str], bool]) -> None:
    """Until the SuperNode ends, put its questions to the owner. Raises ResourceError for how it ended."""
    while process.poll() is None:
        for content, question in open_questions(folder).items():
            answer(folder, content, yes=ask(question))
        time.sleep(LOOKS_EVERY)
    raise ResourceError(f"the SuperNode ended; {folder / LOG} ends: {shown(last_lines(folder / LOG), 300)}")
