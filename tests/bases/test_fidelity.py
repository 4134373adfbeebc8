"""The Fréchet distance against closed forms."""

from __future__ import annotations

import torch

from emojiland.fidelity import frechet_distance, renders


def test_equal_sets_are_at_distance_0_and_moved_ones_at_the_square_of_the_way() -> None:
    points = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    way = torch.tensor([1.0, 0, 2, 0, 0])
    assert abs(frechet_distance(points, points)) < 1e-6
    assert abs(frechet_distance(points, points + way) - 5) < 1e-6


def test_a_scaled_set_is_as_far_as_its_standard_deviations_differ() -> None:
    """Of normal distributions with covariances C and s²C: (s - 1)² tr C, beside the way between the means."""
    points = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    points -= points.mean(0)
    assert abs(frechet_distance(points, 3 * points) - 4 * points.double().var(0).sum()) < 1e-4


def test_renders_are_seeded_and_differ_by_seed() -> None:
    first, again, other = renders(2), renders(2), renders(2, seed=7)
    assert [one.image.tobytes() for one in first] == [one.image.tobytes() for one in again]
    assert first[0].image.tobytes() != other[0].image.tobytes()
