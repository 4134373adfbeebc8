"""Numbers as whole ones, so that sums of them are exact whatever masks were added on the way.

Secure aggregation adds integers modulo 2³². A number is rounded to a multiple of a unit, which all know, and cut into
limbs of 20 bits, each of which is summed for itself: up to 2¹¹ clients do not overflow. So nothing is lost but the
rounding, whereas one quantization to 2²² levels between the largest and the smallest number (Flower's default) buries
the small eigenvalues of moments, on which a solution depends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from mixofshow.errors import BadInputError

LIMB_BITS: Final = 20
LIMBS: Final = 3
LEVELS: Final = 2**LIMB_BITS
LARGEST: Final = 2 ** (LIMBS * LIMB_BITS - 1)
"""Units that a number may have at most."""
MAX_CLIENTS: Final = 2**11
MOMENT_UNIT: Final = 2.0**-22
"""Of moments, sums of squares of what layers see: up to 2³⁶."""
RHS_UNIT: Final = 2.0**-28
"""Of right-hand sides ΔW C, up to 2³⁰."""
CHANGE_UNIT: Final = 2.0**-36
"""Of changes of weights, up to 2²²."""


def to_limbs(numbers: Tensor, unit: float) -> list[Tensor]:
    """Numbers as limbs from the lowest on, each a tensor of doubles that are whole, in [-2¹⁹, 2¹⁹).

    Raises BadInputError for numbers that are too large, or none.
    """
    units = (numbers.double() / unit).round()
    if not torch.isfinite(units).all() or units.abs().max() >= LARGEST / 2:
        raise BadInputError(f"numbers over {unit * LARGEST / 2:.2g}, or not finite, cannot be summed")
    left, limbs = units.long(), []
    for _ in range(LIMBS):
        low = (left + LEVELS // 2).remainder(LEVELS) - LEVELS // 2
        limbs.append(low.double())
        left = (left - low) // LEVELS
    return limbs


def from_limbs(limbs: Sequence[Tensor], unit: float) -> Tensor:
    """Sums of numbers from sums of their limbs."""
    total = torch.zeros_like(limbs[0], dtype=torch.int64)
    for number, limb in enumerate(limbs):
        total += limb.round().long() << (LIMB_BITS * number)
    return total.double() * unit
