"""A self-contained HTML page: text, tables and pictures in one file that works from a mail or a disk."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from PIL import Image

from mixofshow.evaluation.protocol import Scores
from mixofshow.outputs import write_text
from mixofshow.sampling.pictures import embedded
from mixofshow.terminal import print_table

STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: .4rem .8rem .8rem 0; vertical-align: top; } figcaption { font-size: .85rem; color: #555; }
img { image-rendering: auto; border-radius: 4px; max-width: 100%; } svg { max-width: 100%; height: auto; } h2 { margin-top: 2.5rem; }
"""


@dataclass
class Page:
    """A page that grows downwards."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """A section's title."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Plain text."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def figure(self, image: Image.Image, caption: str, *, scale: int = 2) -> None:
        """A picture, enlarged, with what it shows below it."""
        large = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
        note = html.escape(caption)
        self.parts.append(f'<figure><img alt="{note}" src="{embedded(large)}"><figcaption>{note}</figcaption></figure>')

    def chart(self, svg: str, caption: str) -> None:
        """A drawing from `charts`, with what it shows below it."""
        self.parts.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column names its rows."""

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        self.parts.append("<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>")

    def save(self, path: Path) -> None:
        """Write the page whole or not at all."""
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
        write_text(
            path,
            f"<!doctype html><html lang=en><head>{head}</head><body><h1>{title}</h1>{''.join(self.parts)}</body></html>\n",
        )


def alignment_rows(means: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Rows of (model, image alignment, text alignment)."""
    images, texts = means["image_alignment"], means["text_alignment"]
    return [[model.replace("_", " "), f"{images[model]:.3f}", f"{texts[model]:.3f}"] for model in images]


def print_alignments(means: Mapping[str, Mapping[str, float]]) -> None:
    """The table of alignments, on the terminal."""
    print_table(("model", "image alignment", "text alignment"), alignment_rows(means))


def write_figures(path: Path, means: Mapping[str, Mapping[str, float]], scores: Scores) -> None:
    """Means and every concept's own alignments as JSON."""
    concepts = {
        model: {name: {"image_alignment": one.image, "text_alignment": one.text} for name, one in by_name.items()}
        for model, by_name in scores.items()
    }
    write_text(path, json.dumps({**means, "concepts": concepts}, indent=1) + "\n")
