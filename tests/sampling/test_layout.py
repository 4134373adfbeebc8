"""Cutting maps into places, on maps whose places are known."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from torch.nn import functional as F

from mixofshow.sampling import layout
from mixofshow.sampling.layout import Square, arranged, cut, filled, smoothed

SIZES = {"smallest": 0.06, "largest": 0.3}


def blobs(*centres, rows=16, columns=40, width=4.0):
    """A map with a bell of height h around each (row, column, h), on a floor of 0.05."""
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    found = torch.full((rows, columns), 0.05)
    for row, column, height in centres:
        found += height * torch.exp(-((down - row) ** 2 + (across - column) ** 2) / (2 * width**2))
    return found


def middle(place):
    """(row, column) of the mean of a place's cells."""
    return tuple(place.nonzero().double().mean(0).tolist())


def connected(place):
    """Whether all cells can be reached from the first one, by an independent flood."""
    cells = {tuple(one) for one in place.nonzero().tolist()}
    front, seen = [min(cells)], {min(cells)}
    while front:
        row, column = front.pop()
        near = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & cells - seen
        seen |= near
        front += near
    return seen == cells


def check(places, maps, *, smallest, largest):
    """What holds of all places: one owner for a cell, connected, no hole, of a size that is allowed."""
    cells = maps[0].numel()
    assert (places.sum(0) <= 1).all()
    for place in places:
        if place.any():
            assert connected(place)
            # The least square of whole cells may be a little smaller than the share; filling holes adds a few cells.
            assert round((smallest * cells) ** 0.5) ** 2 <= place.sum() <= largest * cells * 1.05


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_three_things_apart_are_found_in_any_order(order):
    columns = (6, 20, 33)
    maps = torch.stack([blobs((8, columns[one], 1.0)) for one in order])
    places = cut(maps, **SIZES)
    check(places, maps, **SIZES)
    for place, one in zip(places, order, strict=True):
        assert abs(middle(place)[1] - columns[one]) < 2
        assert abs(middle(place)[0] - 8) < 2


def test_two_of_one_kind_get_one_each_though_both_maps_prefer_the_same():
    maps = torch.stack([blobs((8, 9, 1.0), (8, 30, 0.8)), blobs((8, 9, 1.0), (8, 30, 0.9))])
    first, second = cut(maps, **SIZES)
    assert middle(first)[1] < 15 and middle(second)[1] > 25
    swapped = cut(maps.flip(0), **SIZES)
    assert torch.equal(swapped.flip(0), torch.stack([first, second]))


def test_the_scale_of_a_map_does_not_matter():
    maps = torch.stack([blobs((8, 9, 1.0)), blobs((8, 30, 1.0))])
    scales = torch.tensor([2.0**-20, 2.0**17])[:, None, None]  # exactly, for the two meet in the middle
    assert torch.equal(cut(scales * maps, **SIZES), cut(maps, **SIZES))


@pytest.mark.parametrize(("smallest", "largest"), [(0.02, 0.05), (0.06, 0.3), (0.2, 0.25), (0.1, 0.6)])
def test_sizes_are_kept(smallest, largest):
    maps = torch.stack([blobs((8, 9, 1.0), width=6), blobs((8, 30, 1.0), width=0.5)])
    check(cut(maps, smallest=smallest, largest=largest), maps, smallest=smallest, largest=largest)


def test_random_maps_keep_the_laws():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        rows, columns, concepts = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((4, 24), (4, 40), (1, 6)))
        maps = F.avg_pool2d(torch.rand(concepts, rows, columns, generator=generator) ** 4, 3, 1, 1)
        taken = torch.rand(rows, columns, generator=generator) < 0.05
        places = cut(maps, **SIZES, taken=taken)
        check(places, maps, **SIZES)
        assert not (places & taken).any()


def test_what_is_taken_by_hand_is_left_alone():
    maps = torch.stack([blobs((8, 9, 1.0), (8, 30, 0.5))])
    taken = torch.zeros(16, 40, dtype=torch.bool)
    taken[:, :20] = True
    (place,) = cut(maps, **SIZES, taken=taken)
    assert not (place & taken).any()
    assert middle(place)[1] > 25


def test_a_flat_map_finds_no_place_and_leaves_the_others_theirs():
    flat = torch.ones(16, 40)
    first, second, nothing = cut(torch.stack([flat, blobs((8, 30, 1.0)), torch.zeros(16, 40)]), **SIZES)
    assert not first.any() and not nothing.any()
    assert abs(middle(second)[1] - 30) < 2


def test_there_is_no_place_where_there_is_no_room():
    maps = torch.stack([blobs((8, 20, 1.0), columns=40)] * 5)
    places = cut(maps, smallest=0.4, largest=0.5)
    assert places.flatten(1).any(1).sum() == 1


def test_arrangement_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        numbers = torch.rand(3, 4, 3, generator=generator).tolist()
        squares = [[Square(int(12 * a), int(12 * b), 5, 1 + c) for a, b, c in of_one] for of_one in numbers]
        found = sum(one.height for one in arranged(squares) if one)
        choices = product(*[[*of_one, None] for of_one in squares])
        assert found == pytest.approx(max(_total(one) for one in choices))


def test_many_concepts_take_no_more_than_so_many_tries(monkeypatch):
    """Nine that all want the same four places: each more took four times as long."""
    looks, meets = [], Square.meets
    monkeypatch.setattr(layout, "TRIES", 1000)
    monkeypatch.setattr(Square, "meets", lambda one, other: looks.append(one) or meets(one, other))
    squares = [[Square(0, 4 * place, 4, 3.0 - 0.1 * place) for place in range(4)] for _ in range(9)]
    chosen = arranged(squares)
    assert len(looks) <= 1000 * 4 * 9
    assert len(chosen) == 9 and _total(chosen) == pytest.approx(sum(one.height for one in squares[0]))


def _total(chosen):
    there = [one for one in chosen if one]
    apart = all(
        not ({*one.cells()} & {*other.cells()}) for number, one in enumerate(there) for other in there[:number]
    )
    return sum(one.height for one in there) if apart else 0


def test_holes_are_filled_unless_somebody_has_them():
    ring = torch.zeros(7, 7, dtype=torch.bool)
    ring[1:6, 1:6] = True
    ring[3, 3] = ring[2, 2] = False
    free = torch.ones(7, 7, dtype=torch.bool)
    free[2, 2] = False
    (found,) = filled(ring[None], free)
    assert found[3, 3] and not found[2, 2] and not found[0, 0]


def test_smoothing_keeps_what_is_even_and_the_mean_of_what_is_inside():
    assert torch.allclose(smoothed(torch.full((1, 9, 12), 3.0, dtype=torch.double), 2), torch.tensor(3.0, dtype=torch.double))
    spot = torch.zeros(1, 31, 31, dtype=torch.double)
    spot[0, 15, 15] = 1
    found = smoothed(spot, 2)
    assert found.sum() == pytest.approx(1) and found.argmax() == spot.argmax()
    assert torch.allclose(found, found.mT) and torch.allclose(found, found.flip(1))
