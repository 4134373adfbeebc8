"""What is printed when a command is done. Names in it may be a stranger's: nothing in them colours or moves anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mixofshow.errors import printable, shown


def say(*lines: object) -> None:
    """Lines on standard output."""
    for line in lines:
        print(printable(str(line)))


def print_table(head: Sequence[str], rows: Iterable[Sequence[str | tuple[str, str]]]) -> None:
    """A table on standard output; a cell is its text, or a text and its colour."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head)
    for row in rows:
        cells = [(cell, "") if isinstance(cell, str) else cell for cell in row]
        # Text, not str: rich would take what stands in brackets for a colour.
        table.add_row(*(Text(shown(text, 300), style) for text, style in cells))
    Console().print(table)
