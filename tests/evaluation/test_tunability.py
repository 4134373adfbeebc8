"""What is counted as learned, on features made by hand."""

from __future__ import annotations

import torch

from emojiland.tunability import Learned, nearest_share, summary


def test_a_picture_counts_for_the_thing_whose_references_are_nearest_on_average():
    axes = torch.eye(3)
    references = {"a": axes[[0, 0]], "b": axes[[1, 0]], "c": axes[[2, 2]]}
    made = torch.stack([axes[0], axes[1], axes[2], axes[0]])
    assert nearest_share(made, references, "a") == 0.5
    assert nearest_share(made, references, "b") == 0.25
    assert nearest_share(made[:1], references, "b") == 0  # one of b's references is as near as all of a's


def test_the_summary_is_of_the_worst_where_a_mean_would_hide_it():
    rows = {"a": Learned(0.5, 0.8, 0.9, 1.0), "b": Learned(0.6, 0.65, 0.9, 0.5)}
    found = summary(rows)
    assert found["nearest"] == 0.75
    assert abs(found["of_references"] - 1.45 / 1.8) < 1e-12
    assert abs(found["above_lower_bound"] - 0.05) < 1e-12
