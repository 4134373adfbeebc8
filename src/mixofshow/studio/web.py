"""Gradio, which takes seconds to import and comes with an extra: imported when something of it is first used.

`from mixofshow.studio import web as gr`, and then as ever.
"""

from __future__ import annotations

import html
import os
from importlib.resources import files
from typing import Any, Final

from mixofshow.errors import SettingsError

NOTHING_IS_FETCHED: Final = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Variables that the library reads while it is imported."""

ROOM: Final = 160
"""Of a place where files are dropped, in pixels: less, and its label lies over what is in it."""


def __getattr__(name: str) -> Any:
    """Whatever Gradio has by this name. Raises SettingsError where it is not installed."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(library(), name)


def library() -> Any:
    """Gradio itself. Raises SettingsError where it is not installed."""
    os.environ.update(NOTHING_IS_FETCHED)
    try:
        import gradio
    except ImportError as error:
        raise SettingsError("the studio needs Gradio: pip install 'mixofshow[studio]'") from error
    return gradio


def line(text: str, *, bad: bool = False) -> str:
    """A line of text as HTML, whoever wrote it; a `bad` one is read out at once by screen readers."""
    role = "alert" if bad else "status"
    return f'<p class="line {"bad" if bad else "good"}" role="{role}">{html.escape(text)}</p>' if text else ""


def lines(texts: list[str]) -> str:
    """Several of them."""
    return "".join(line(text) for text in texts)


def many(count: int, thing: str) -> str:
    """So many of a thing, in words."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def source(*names: str) -> str:
    """The page's own files (HTML, CSS, JavaScript), in a row."""
    return "\n".join((files("mixofshow.studio") / name).read_text("utf-8") for name in names)
