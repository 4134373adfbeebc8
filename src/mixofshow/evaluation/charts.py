"""Charts as pictures in SVG, drawn by matplotlib (the extra `report`): values with intervals, a matrix of shares."""

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
Point = tuple[float, float, float]
"""A value between the ends of its interval."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def value_chart(
    groups: Sequence[str], series: Mapping[str, Sequence[Point]], *, joined: bool = False, line: float | None = None
) -> str:
    """A value of each series in each group, side by side or `joined` by lines; `line` is a level. As a data URI.

    No bars, for their heights would mean nothing where an axis does not begin at 0.
    """
    axes = _axes(820, 300)
    for number, (name, points) in enumerate(series.items()):
        aside = 0.0 if joined else (number - (len(series) - 1) / 2) * 0.5 / len(series)
        places, values = [group + aside for group in range(len(groups))], [value for value, _, _ in points]
        reach = [
            [max(0.0, value - low) for value, low, _ in points],
            [max(0.0, high - value) for value, _, high in points],
        ]
        style = {"color": COLOURS[number % len(COLOURS)], "fmt": "o-" if joined else "o", "label": f" {name}"}
        axes.errorbar(places, values, reach, **style)
        for place, value in () if joined else zip(places, values, strict=True):
            axes.annotate(f"{value:.3f}", (place, value), xytext=(6, -3), textcoords="offset points", fontsize=8)
    if line is not None:
        axes.axhline(line, color="#444444", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(groups)), groups, parse_math=False)
    axes.margins(x=0.1, y=0.15)
    axes.grid(axis="y", color="#e5e5e5")
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    return _data_uri(axes)


def matrix_chart(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Shares from 0 (white) to 1 (dark): a row for what was asked for, a column for what it was judged as. A data URI."""
    side = 140 + 34 * len(names)
    axes = _axes(side, side)
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for row, shares in enumerate(matrix):
        for column, share in enumerate(shares):
            if share >= 0.005:
                style = {"ha": "center", "va": "center", "color": "white" if share > 0.5 else "black", "fontsize": 8}
                axes.text(column, row, f"{share:.2f}", **style)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xticks(range(len(names)), names, parse_math=False, rotation=60, ha="left")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    return _data_uri(axes)


def _axes(width: int, height: int) -> Any:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its cache of fonts
    from matplotlib.figure import Figure

    return Figure((width / DOTS, height / DOTS), layout="constrained").subplots()


def _data_uri(axes: Any) -> str:
    """The figure as a picture, which runs no script and shares no ids with others; the same figure gives the same text."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "mixofshow", "svg.fonttype": "none"}):
        warnings.simplefilter("ignore")  # of letters that its font lacks; the reader's has them
        axes.figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()
