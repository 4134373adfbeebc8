"""Cutting maps into places: every cell to one concept or to the background, each concept one connected place.

A place begins as a square of the smallest size where its concept's map is high. Which square each concept gets is decided
for all of them at once, so that the sum is the largest that squares apart from each other can have: of two dogs, each of
which is on both dogs' maps, each gets a dog of its own. From there places grow side by side, the highest cells first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

CANDIDATES: Final = 8
"""Squares that are tried for each concept, the highest ones."""
TRIES: Final = 100_000
"""How many beginnings of arrangements are looked at: about a second's worth."""
FLAT: Final = 1.2
"""Where even the best square has no more of a map than this many times its share of the picture, there is no place."""
EDGE: Final = 0.2
"""A place ends where its concept's map falls below this share of its mean in the first square."""
REACH: Final = 0.6
"""How far a place reaches from its square's middle, over the side of the largest square, so that it flows around nobody."""
_NEIGHBOURS: Final = ((0, 1), (1, 0), (0, -1), (-1, 0))


@dataclass(frozen=True)
class Square:
    """Where a place may begin, in cells, and how much of the map is there, as a multiple of the whole map's mean."""

    top: int
    left: int
    side: int
    height: float

    def cells(self) -> Iterator[tuple[int, int]]:
        """(row, column) of each of its cells."""
        return product(range(self.top, self.top + self.side), range(self.left, self.left + self.side))

    def mean(self, values: Tensor) -> Tensor:
        """Of values of all cells, (rows, columns), the mean in it."""
        return values[self.top : self.top + self.side, self.left : self.left + self.side].mean()

    def near(self, row: int, column: int, reach: float) -> bool:
        """Whether a cell lies at most so far from its middle, down and across."""
        middle = (self.side - 1) / 2
        return max(abs(row - self.top - middle), abs(column - self.left - middle)) <= reach

    def meets(self, other: Square) -> bool:
        """Whether the two have a cell in common."""
        return abs(self.top - other.top) < self.side and abs(self.left - other.left) < self.side


def cut(maps: Tensor, *, smallest: float, largest: float, taken: Tensor | None = None) -> Tensor:
    """Which cells are each concept's place: maps of at least 0, (concepts, rows, columns), to bool of the same shape.

    A place has between `smallest` and `largest` of all cells, as shares, and none that are `taken`, (rows, columns). A
    concept whose map is flat, or for which there is no room beside the others, gets no cell.
    """
    rows, columns = maps.shape[1:]
    free = torch.ones(rows, columns, dtype=torch.bool) if taken is None else ~taken
    side = max(1, min(round(math.sqrt(smallest * rows * columns)), rows, columns))
    even = maps.double() / maps.double().mean((1, 2), keepdim=True).clamp(min=1e-30)
    squares = [list(_squares(one, free, side)) for one in even]
    begun = arranged(squares)
    room = max(side * side, math.floor(largest * rows * columns))
    return filled(_grown(smoothed(even, 3 * side / 8), begun, free, room), free)


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of so many cells, which takes nothing from beyond the edge: (…, rows, columns) to the same."""
    reach = max(1, math.ceil(3 * sigma))
    bell = torch.exp(-(torch.arange(-reach, reach + 1, dtype=maps.dtype) ** 2) / (2 * max(sigma, 1e-3) ** 2))

    def along(values: Tensor) -> Tensor:
        return F.conv1d(values.reshape(-1, 1, values.shape[-1]), bell[None, None], padding=reach).reshape(values.shape)

    inside = along(along(torch.ones_like(maps[:1])).mT).mT
    return along(along(maps).mT).mT / inside


def _squares(even: Tensor, free: Tensor, side: int) -> Iterator[Square]:
    """The highest squares of free cells of a map whose mean is 1, the best first, none of them much like another."""
    heights = F.avg_pool2d(even[None], side, stride=1)[0]
    heights = heights.masked_fill(F.avg_pool2d((~free).double()[None], side, stride=1)[0] > 0, 0)
    apart = max(1, side // 2)
    for _ in range(CANDIDATES):
        number = int(heights.argmax())
        top, left = divmod(number, heights.shape[1])
        found = Square(top, left, side, float(heights[top, left]))
        if found.height < FLAT:
            return
        yield found
        heights[max(0, top - apart + 1) : top + apart, max(0, left - apart + 1) : left + apart] = 0


def arranged(squares: Sequence[Sequence[Square]]) -> list[Square | None]:
    """One square for each concept out of its own, no two with a common cell, so that their heights' sum is the largest.

    None for a concept that there is no room for. Branch and bound: concepts in turn, the best squares first; of many
    concepts, the best of `TRIES` arrangements, which begin with the greedy one.
    """
    tries = 0
    best: tuple[float, list[Square | None]] = (-1.0, [None] * len(squares))
    hopes = [max((one.height for one in of), default=0.0) for of in squares]

    def choose(chosen: list[Square | None], total: float) -> None:
        nonlocal best, tries
        tries += 1
        if tries > TRIES or total + sum(hopes[len(chosen) :]) <= best[0]:
            return
        if len(chosen) == len(squares):
            best = (total, chosen)
            return
        for one in squares[len(chosen)]:
            if not any(other is not None and one.meets(other) for other in chosen):
                choose([*chosen, one], total + one.height)
        choose([*chosen, None], total)

    choose([], 0.0)
    return best[1]


def _grown(even: Tensor, begun: Sequence[Square | None], free: Tensor, room: int) -> Tensor:
    """Places that grow from their squares side by side, the highest cells first, to their maps' edges or `room` cells.

    Of what lies beyond the squares, a place takes only cells where its map, over its mean in its square, is the highest.
    """
    # Lists, since a tensor takes a hundred times as long to read a cell.
    owner = torch.full(free.shape, -1).masked_fill(~free, len(begun)).tolist()
    found = torch.stack([one / square.mean(one) if square else 0 * one for one, square in zip(even, begun, strict=True)])
    heights, highest = found.tolist(), found.argmax(0).tolist()
    sizes, front = [0] * len(begun), list[tuple[float, int, int, int]]()

    def take(concept: int, row: int, column: int) -> None:
        owner[row][column] = concept
        sizes[concept] += 1
        for down, across in _NEIGHBOURS:
            y, x = row + down, column + across
            if 0 <= y < len(owner) and 0 <= x < len(owner[0]) and owner[y][x] < 0:
                heapq.heappush(front, (-heights[concept][y][x], concept, y, x))

    for concept, square in enumerate(begun):
        for row, column in square.cells() if square else ():
            take(concept, row, column)
    squares = [square or Square(0, 0, 0, 0.0) for square in begun]
    while front:
        height, concept, row, column = heapq.heappop(front)
        mine = highest[row][column] == concept and owner[row][column] < 0
        near = squares[concept].near(row, column, REACH * math.sqrt(room))
        if -height >= EDGE and mine and near and sizes[concept] < room:
            take(concept, row, column)
    return torch.stack([torch.tensor(owner) == concept for concept in range(len(begun))])


def filled(places: Tensor, free: Tensor) -> Tensor:
    """Places without holes, (concepts, rows, columns): a free cell that one place surrounds becomes part of it."""
    outside = ~places
    reached = torch.zeros_like(places)
    reached[:, [0, -1]] = outside[:, [0, -1]]
    reached[:, :, [0, -1]] |= outside[:, :, [0, -1]]
    while True:
        near = F.max_pool2d(rearrange(reached.double(), "concepts rows columns -> concepts 1 rows columns"), 3, 1, 1)
        further = (near[:, 0] > 0) & outside
        if torch.equal(further, reached):
            break
        reached = further
    holes = outside & ~reached & free & ~places.any(0)
    return places | holes
