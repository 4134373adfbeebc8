"""Models that strangers made, built by libraries that believe them: loaded without noise, and failing in our words."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

from mixofshow.errors import BaseModelError, MixOfShowError, ResourceError, ours, shown

_LOUDNESS: Final = threading.Lock()
_INSIDE: Final[list[int]] = []
"""The threads that want quiet."""
_LOUD: Final[list[tuple[Any, int, bool]]] = []
"""Libraries, and how loud they were before the first of them."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers and transformers show errors only, and no progress bars; afterwards what they did before.

    Where several threads are inside, after the last.
    """
    # Loading a tiny model takes a second; importing diffusers takes four, so only those who load pay for it.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with _LOUDNESS:
        if not _INSIDE:
            libraries = (diffusers_logging, transformers_logging)
            _LOUD[:] = [(one, one.get_verbosity(), one.is_progress_bar_enabled()) for one in libraries]
            for library in libraries:
                library.disable_progress_bar()
                library.set_verbosity_error()
        _INSIDE.append(threading.get_ident())
    try:
        yield
    finally:
        with _LOUDNESS:
            _INSIDE.pop()
            for library, verbosity, bars in () if _INSIDE else _LOUD:
                library.set_verbosity(verbosity)
                if bars:
                    library.enable_progress_bar()


@contextlib.contextmanager
def strangers_model(problem: str, error: type[MixOfShowError] = BaseModelError) -> Iterator[None]:
    """Whatever a library raises inside is an `error`, the model's: it believes configurations, and fails in any way.

    What it would print about that stays unsaid.
    """
    try:
        with quiet():
            yield
    except (MixOfShowError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as foreign:  # tokenizers' panics are no Exception
        if isinstance(machine := ours(foreign), ResourceError):
            raise machine from foreign
        reason = next(iter(str(foreign).strip().splitlines()), type(foreign).__name__)
        raise error(f"{problem} ({shown(reason, 140)})") from foreign
