"""Who stands where is found out wherever it is: on the world's own pictures, where it is known."""

from __future__ import annotations

from itertools import permutations
from random import Random

import pytest
import torch

from mixofshow.bases.emojiland.concepts import SUBJECTS, concept_pictures
from mixofshow.bases.emojiland.judge import image_features
from mixofshow.bases.emojiland.world import SIZE, WIDE, compose, places
from mixofshow.evaluation.identities import Identities, identities, optimal_matching, summarized
from mixofshow.evaluation.requests import columns, equal_shares

NAMES = ("clown", "steamtrain", "robot")
SCENES = ("in the forest", "on the beach", "in the city", "in the snow")


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2), (1, 1), (5, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_the_matching_is_the_best_of_all(shape, seed):
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    found = optimal_matching(scores)
    rows, columns_ = shape
    if rows <= columns_:
        best = max(sum(scores[k, one] for k, one in enumerate(way)) for way in permutations(range(columns_), rows))
    else:
        best = max(sum(scores[one, k] for k, one in enumerate(way)) for way in permutations(range(rows), columns_))
    taken = [one for one in found if one is not None]
    assert len(taken) == len(set(taken)) == min(shape)
    assert sum(scores[k, one] for k, one in enumerate(found) if one is not None) == pytest.approx(float(best))


def test_the_best_is_not_each_places_own():
    assert optimal_matching(torch.tensor([[0.9, 0.8], [0.9, 0.1]])) == [1, 0]


def test_counts_by_hand():
    """Asked for 0, 1, 2; places show 0, 0, 3, which is another concept."""
    one = Identities((0, 1, 2), (0, 1, 2), (0, 0, 3))
    assert (one.accuracy, one.missing, one.doubled) == (1 / 3, {1: 1, 2: 1}, {0: 1})
    found = summarized([[one, Identities((0, 1, 2), (2, 0, 1), (2, 0, 1))]], list("abcd"))
    assert (found["accuracy"], found["asked"], found["missing"], found["doubled"]) == (4 / 6, 6, 2, 1)
    assert found["matrix"] == [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 0]]
    assert found["by_concept"]["b"] == {"accuracy": 0.5, "missing": 1, "doubled": 0}
    assert list(found["by_concept"]) == ["a", "b", "c"]
    twice = Identities((0, 0, 1), (0, 0, 1), (0, 0, 1))
    assert not twice.missing and not twice.doubled and twice.accuracy == 1


@pytest.fixture(scope="module")
def references():
    return [image_features([one.image for one in concept_pictures(name, 12, seed=1)]) for name in NAMES]


@pytest.fixture(scope="module")
def look(references):
    """`look(names, asked)`: who is found in true pictures of these things from left to right, asked for others."""

    def found(names, asked, boxes=columns):
        random, sprites = Random(0), [(name, SUBJECTS[name].picture()) for name in names]
        images = [
            compose(sprites, scene, random, width=WIDE, laid=places(random, len(names), width=WIDE)).image
            for scene in SCENES
        ]
        numbers = [NAMES.index(name) for name in asked]
        crops = [
            image_features([image.crop(box) for box in boxes(len(names), WIDE, SIZE)]) for image in images
        ]
        return summarized([[identities(one, references, numbers) for one in crops]], NAMES)

    return found


@pytest.mark.parametrize("order", list(permutations(NAMES)))
def test_whoever_is_there_is_found_in_whatever_order(order, look):
    found = look(order, NAMES)
    assert found["accuracy"] >= 11 / 12
    assert found["missing"] <= 1 and found["doubled"] <= 1


def test_places_may_be_equal_shares(look):
    assert equal_shares(3, 160, 64) == ((0, 0, 53, 64), (53, 0, 107, 64), (107, 0, 160, 64))
    assert look(NAMES[::-1], NAMES, equal_shares)["accuracy"] >= 11 / 12


def test_who_is_missing_and_who_is_there_twice(look):
    found = look(("clown", "steamtrain", "clown"), NAMES)
    assert 3 <= found["by_concept"]["robot"]["missing"] <= 4
    assert 3 <= found["by_concept"]["clown"]["doubled"] <= 4
    robot = found["matrix"][NAMES.index("robot")]
    assert robot[NAMES.index("clown")] >= 0.75
    assert found["by_concept"]["steamtrain"]["accuracy"] == 1
