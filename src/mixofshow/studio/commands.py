"""Command lines that do what the page does, for a shell in the workspace's folder."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixofshow.studio.workspace import Workspace


def line(workspace: Workspace, *words: str, device: str = "cpu") -> str:
    """A command with how the base is loaded, where that is not as usual; `device` is the command's own default."""
    usual = {"device": device}
    loading = {key: value for key, value in workspace.loading.items() if value not in (None, False, usual.get(key))}
    return shlex.join(["mixofshow", *words, *options(loading)])


def options(table: Mapping[str, Any]) -> list[str]:
    """Settings by dotted keys as options."""
    return [word for key, value in table.items() for word in _option(key.replace("_", "-"), value)]


def _option(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield f"--{name}" if value else f"--no-{name}"
    elif name == "options":
        yield from (word for key, one in value.items() for word in ("--set", f"{key}={one}"))
    elif isinstance(value, Mapping):
        yield from (f"--{name}", ",".join(f"{key}={one}" for key, one in value.items()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from (word for one in value for word in (f"--{name}", str(one)))
    else:
        yield from (f"--{name}", str(value))
