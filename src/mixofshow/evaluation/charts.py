"""Charts as pictures in SVG, drawn by matplotlib (the extra `report`): bars with intervals, lines, a matrix of shares."""

from __future__ import annotations

import base64
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Final

COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999")
"""Okabe and Ito's, which colour-blind people can tell apart."""
DOTS: Final = 72
"""Per inch, as SVG has them."""
WIDTH: Final = 820
HEIGHT: Final = 300

Point = tuple[float, float, float]
"""A value between the ends of its interval."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def bar_chart(groups: Sequence[str], series: Mapping[str, Sequence[Point]], *, line: float | None = None) -> str:
    """Bars side by side in each group, one of each series; `line` is a level to compare with. As a data URI."""
    axes, each = _axes(), 0.8 / len(series)
    for number, (name, points) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * each for group in range(len(groups))]
        bars = axes.bar(places, **_drawn(points, "height"), width=0.92 * each, label=_text(name), color=_colour(number))
        axes.bar_label(bars, fmt="%.3f", fontsize=7)
    low, high = _range(series, line)
    axes.set_ylim(min(0.0, low) if low < 0 else low, high)  # the zero of a score of this kind says nothing
    return _labelled(axes, groups, line)


def line_chart(steps: Sequence[str], series: Mapping[str, Sequence[Point]], *, line: float | None = None) -> str:
    """A line for each series from step to step; `line` is a level to compare with. As a data URI."""
    axes = _axes()
    for number, (name, points) in enumerate(series.items()):
        axes.errorbar(range(len(steps)), **_drawn(points, "y"), label=_text(name), color=_colour(number), marker="o")
    return _labelled(axes, steps, line)


def matrix_chart(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Shares from 0 (white) to 1 (dark): a row for what was asked for, a column for what it was judged as."""
    side = 140 + 34 * len(names)
    axes = _axes(side, side)
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for row, shares in enumerate(matrix):
        for column, share in enumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_yticks(range(len(names)), [*map(_text, names)], parse_math=False)
    axes.set_xticks(range(len(names)), [*map(_text, names)], parse_math=False, rotation=60, ha="left")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    return _data_uri(axes)


def _axes(width: int = WIDTH, height: int = HEIGHT) -> Any:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its cache of fonts
    from matplotlib.figure import Figure

    return Figure((width / DOTS, height / DOTS), layout="constrained").subplots()


def _drawn(points: Sequence[Point], name: str) -> dict[str, Any]:
    """Values under the `name` that matplotlib has for them, and how far their intervals reach down and up."""
    down, up = zip(*((max(0.0, value - low), max(0.0, high - value)) for value, low, high in points), strict=True)
    return {name: [value for value, _, _ in points], "yerr": (down, up)}


def _range(series: Mapping[str, Sequence[Point]], line: float | None) -> tuple[float, float]:
    values = [value for points in series.values() for point in points for value in point]
    values += [] if line is None else [line]
    room = max(0.02, 0.15 * (max(values) - min(values)))
    return min(values) - room, max(values) + room


def _labelled(axes: Any, groups: Sequence[str], line: float | None) -> str:
    if line is not None:
        axes.axhline(line, color="#444444", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(groups)), [*map(_text, groups)], parse_math=False)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    return _data_uri(axes)


def _text(name: str) -> str:
    """A name as matplotlib takes it: one with an underscore in front it would leave out of a legend."""
    return f" {name}"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _data_uri(axes: Any) -> str:
    """The figure as a picture, which runs no script and has no ids in common with others; the same figure, the same text."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "mixofshow", "svg.fonttype": "none"}):
        warnings.simplefilter("ignore")  # of letters that its font lacks; the reader's has them
        axes.figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()
