"""Confidence intervals by bootstrap over seeds (Efron, 1979): how far a mean would move with other seeds."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

RESAMPLES: Final = 2000
LEVEL: Final = 0.95

Interval = tuple[float, float]


def interval(values: Tensor) -> Interval:
    """The 95 % percentile interval of the mean of `values`, (seeds,); equal values always give equal intervals.

    With one seed it is that value twice: nothing is known then. With few seeds it is too narrow.
    """
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = values.double()[chosen].mean(-1)
    low, high = means.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return low, high
