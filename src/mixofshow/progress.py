"""One callback for everything that takes a while, shared by terminal, web page and tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called as (steps done, steps in all, figures such as {"loss": 0.1})."""


def silent(step: int, total: int, info: Mapping[str, float]) -> None:
    """Progress that nobody watches."""
