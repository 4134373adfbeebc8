"""One callback for everything that takes a while, shared by terminal, web page and tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called as (steps done, steps in all, figures such as {"loss": 0.1})."""


def silent(step: int, total: int, info: Mapping[str, float]) -> None:
    """Progress that nobody watches."""


def as_part(progress: Progress, number: int, count: int) -> Progress:
    """Progress of part `number` out of `count` as progress of them all."""
    return lambda step, total, info: progress(number * total + step, count * total, info)


@contextlib.contextmanager
def terminal_bar(label: str, *, hidden: bool = False) -> Iterator[Progress]:
    """A progress bar with figures, time passed and time left, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), disable=hidden)
    task = bar.add_task(label, total=None, figures="")

    def show(step: int, total: int, info: Mapping[str, float]) -> None:
        figures = "  ".join(f"{name} {value:.3g}" for name, value in info.items())
        bar.update(task, completed=step, total=total, figures=figures)

    bar.start()
    try:
        yield show
    except BaseException:
        bar.live.transient = True  # an error's line is to be the only one,
        bar.live.stop()  # without the empty one that `bar.stop` prints into a file
        raise
    bar.stop()
