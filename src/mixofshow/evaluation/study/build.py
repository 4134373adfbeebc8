"""One HTML page with pairs of pictures, for people to answer in a browser without any server.

Which method stands left is drawn by lot, half of the time each; the page does not show the methods' names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import Any, Final

from PIL import Image

from mixofshow.errors import BadInputError, SettingsError, nearest, shown
from mixofshow.evaluation.protocol import references_of
from mixofshow.evaluation.suite.index import Index, State, inside, read_index
from mixofshow.outputs import write_text
from mixofshow.sampling.pictures import embedded
from mixofshow.tuning.pictures import read_picture

Pair = tuple[str, str]
Place = Callable[[Path], Path]
"""Where a path of the index leads to."""
PLACE: Final = "<!-- the study -->"
REFERENCES: Final = 4
"""Pictures of the concept that a page shows beside each pair, at most."""
SIDE: Final = 512
"""Pictures are shown no larger, in pixels."""


def build_study(
    folder: Path,
    pairs: Sequence[str],
    target: Path,
    *,
    count: int = 40,
    seed: int = 0,
    state: State = "fused",
    outside: bool = False,
) -> int:
    """Write the page and return how many pairs of pictures it asks about.

    `folder` is what a suite wrote, `pairs` are methods as "A,B"; of each, `count` pictures are asked about, spread
    over the concepts and drawn by lot from `seed`. Pictures lie in the folder, unless others are allowed (`outside`).
    Raises BadInputError, SettingsError.
    """
    if count < 1:
        raise SettingsError(f"count: expected at least 1, found {count}")
    index = read_index(folder)
    place = partial(inside, folder, outside=outside)
    asked = [_pair(text, index) for text in pairs]
    random = Random(seed)
    items = [item for pair in asked for item in _items(index, place, pair, state, count=count, random=random)]
    random.shuffle(items)
    study = {"pairs": asked, "items": items, "references": _references(index, place, items)}
    text = json.dumps({"id": hashlib.sha256(json.dumps(study).encode()).hexdigest()[:16], **study})
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    write_text(target, page.replace(PLACE, text.replace("<", r"\u003c")))
    return len(items)


def _pair(text: str, index: Index) -> Pair:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in index.methods:
            raise SettingsError(f"pairs: no method '{shown(name)}' in this suite{nearest(name, index.methods)}")
    if len(names) != 2 or names[0] == names[1]:
        raise SettingsError(f"pairs: expected two methods as A,B, found '{shown(text)}'")
    return names[0], names[1]


def _items(
    index: Index, place: Place, pair: Pair, state: State, *, count: int, random: Random
) -> Iterator[dict[str, Any]]:
    """What is asked about a pair of methods: pictures of one prompt and seed, side by side."""
    found = list(
        _in_turn([_shuffled(list(_of_concept(index, pair, state, name)), random) for name in index.references])
    )
    if len(found) < count:
        raise BadInputError(f"the suite has {len(found)} pictures of each method, {count} are asked for")
    lefts = _shuffled([number % 2 for number in range(count)], random)
    for (name, prompt, pictures), left in zip(found[:count], lefts, strict=False):
        sides = [{"method": pair[k], "picture": _source(place(pictures[k]))} for k in (left, 1 - left)]
        yield {"concept": name, "prompt": prompt, "left": sides[0], "right": sides[1]}


def _of_concept(index: Index, pair: Pair, state: State, name: str) -> Iterator[tuple[str, str, tuple[Path, Path]]]:
    """Concept, prompt, and both methods' pictures of each of its prompts and seeds."""
    one, other = (index.methods[method][state][name] for method in pair)
    for first, second in zip(one, other, strict=True):
        for pictures in zip(first.pictures, second.pictures, strict=True):
            yield name, first.prompt, pictures


def _shuffled(values: list[Any], random: Random) -> list[Any]:
    return random.sample(values, len(values))


def _in_turn(rows: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """The first of every row, then the second of every row, …; rows that have ended are passed over."""
    return (one for one in chain.from_iterable(zip_longest(*rows)) if one is not None)


def _references(index: Index, place: Place, items: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """By concept, as sources of pictures."""
    return {
        name: [_encoded(image) for image in references_of(place(index.references[name]))[:REFERENCES]]
        for name in sorted({item["concept"] for item in items})
    }


def _source(path: Path) -> str:
    return _encoded(read_picture(path).image)


def _encoded(image: Image.Image) -> str:
    """The picture as a data URI, drawn anew: what a file says about its making would tell the method."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    return embedded(image)
