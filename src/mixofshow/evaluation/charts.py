"""Charts as inline SVG: bars with intervals, lines, and a matrix of shares. Numbers in, text out."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999")
"""Okabe and Ito's, which colour-blind people can tell apart."""
WIDTH: Final = 720
HEIGHT: Final = 300
LEFT: Final = 48
TOP: Final = 12
BOTTOM: Final = 64
"""Room for the numbers of the axis, above it, and for labels and legend below it."""
CELL: Final = 26
NAMES: Final = 110


@dataclass(frozen=True)
class Point:
    """A value and, if known, its interval."""

    value: float
    low: float | None = None
    high: float | None = None


def bar_chart(groups: Sequence[str], series: Mapping[str, Sequence[Point]], *, line: float | None = None) -> str:
    """Bars side by side in each group, one of each series; `line` is a level to compare with."""
    scale = _Scale.of(series, line)
    wide = (WIDTH - LEFT) / len(groups)
    bar = 0.8 * wide / len(series)
    parts = list(scale.axis(line))
    for number, points in enumerate(series.values()):
        for group, point in enumerate(points):
            x = LEFT + group * wide + 0.1 * wide + number * bar
            y = scale.y(point.value)
            title = _title(groups[group], list(series)[number], point)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{0.92 * bar:.1f}" height="{max(0.0, scale.floor - y):.1f}" '
                f'fill="{_colour(number)}">{title}</rect>'
            )
            parts += _whisker(x + 0.46 * bar, point, scale)
    parts += [_label(LEFT + (k + 0.5) * wide, name, wide) for k, name in enumerate(groups)]
    return _svg([*parts, *_legend(list(series))], WIDTH, HEIGHT)


def line_chart(steps: Sequence[str], series: Mapping[str, Sequence[Point]], *, line: float | None = None) -> str:
    """A line for each series from step to step."""
    scale = _Scale.of(series, line)
    wide = (WIDTH - LEFT) / len(steps)
    parts = list(scale.axis(line))
    for number, (name, points) in enumerate(series.items()):
        places = [(LEFT + (k + 0.5) * wide, scale.y(point.value)) for k, point in enumerate(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(number)}" stroke-width="2"/>')
        for (x, y), point, step in zip(places, points, steps, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_colour(number)}">{_title(step, name, point)}</circle>'
            )
            parts += _whisker(x, point, scale)
    parts += [_label(LEFT + (k + 0.5) * wide, name, wide) for k, name in enumerate(steps)]
    return _svg([*parts, *_legend(list(series))], WIDTH, HEIGHT)


def matrix_chart(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Shares from 0 (white) to 1 (dark): a row for what was asked for, a column for what it was judged as."""
    side = CELL * len(names)
    parts = []
    for row, (name, shares) in enumerate(zip(names, matrix, strict=True)):
        y = NAMES + row * CELL
        parts.append(f'<text x="{NAMES - 6}" y="{y + 17}" text-anchor="end">{html.escape(name)}</text>')
        place = f"{NAMES + row * CELL + 17} {NAMES - 6}"
        x = place.split(maxsplit=1)[0]
        parts.append(f'<text x="{x}" y="{NAMES - 6}" transform="rotate(-60 {place})">{html.escape(name)}</text>')
        for column, share in enumerate(shares):
            title = f"<title>asked {html.escape(name)}, judged {html.escape(names[column])}: {share:.2f}</title>"
            parts.append(
                f'<rect x="{NAMES + column * CELL}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{_shade(share)}" stroke="#ddd">{title}</rect>'
            )
    return _svg(parts, NAMES + side + 60, NAMES + side)


@dataclass(frozen=True)
class _Scale:
    """From values to pixels, between two round numbers."""

    low: float
    high: float

    @classmethod
    def of(cls, series: Mapping[str, Sequence[Point]], line: float | None) -> _Scale:
        points = [point for row in series.values() for point in row]
        values = [point.value for point in points] + ([] if line is None else [line])
        values += [value for point in points for value in (point.low, point.high) if value is not None]
        low, high = min(values), max(values)
        room = max(0.02, 0.15 * (high - low))
        # All heights are of one kind of score, whose zero says nothing; so the axis begins where they do.
        return cls(min(0.0, low) if low < 0 else max(0.0, low - room), high + room)

    @property
    def floor(self) -> float:
        return HEIGHT - BOTTOM

    def y(self, value: float) -> float:
        return self.floor - (value - self.low) / (self.high - self.low) * (self.floor - TOP)

    def axis(self, line: float | None) -> Iterator[str]:
        for k in range(5):
            value = self.low + k / 4 * (self.high - self.low)
            y = self.y(value)
            yield f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e5"/>'
            yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        if line is not None:
            y = self.y(line)
            yield (
                f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#444" stroke-dasharray="6 4">'
                f"<title>{line:.3f}</title></line>"
            )


def _whisker(x: float, point: Point, scale: _Scale) -> list[str]:
    if point.low is None or point.high is None:
        return []
    return [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{scale.y(point.low):.1f}" y2="{scale.y(point.high):.1f}" stroke="#222"/>'
    ]


def _legend(names: Sequence[str]) -> list[str]:
    wide = (WIDTH - LEFT) / len(names)
    parts = []
    for number, name in enumerate(names):
        x = LEFT + number * wide
        parts.append(f'<rect x="{x:.0f}" y="{HEIGHT - 18}" width="12" height="12" fill="{_colour(number)}"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="{HEIGHT - 8}">{html.escape(name)}</text>')
    return parts


def _label(x: float, text: str, room: float) -> str:
    letters = max(4, int(room / 6.5))
    short = text if len(text) <= letters else text[: letters - 1] + "…"
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{html.escape(short)}</text>'


def _title(group: str, name: str, point: Point) -> str:
    between = "" if point.low is None or point.high is None else f" ({point.low:.3f} to {point.high:.3f})"
    return f"<title>{html.escape(f'{group}, {name}: {point.value:.3f}{between}')}</title>"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _shade(share: float) -> str:
    red, green, blue = (round(255 - share * (255 - dark)) for dark in (8, 48, 107))
    return f"rgb({red},{green},{blue})"


def _svg(parts: Sequence[str], width: int, height: int) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#333">{"".join(parts)}</svg>'
    )
