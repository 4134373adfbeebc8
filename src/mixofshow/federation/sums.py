"""What gradient fusion needs of all concepts together, and of none alone: three sums for each layer.

In mode independent and with equal weights, W = W0 + (Σ ΔW_i C_i + λD)(Σ C_i + λI)⁻¹ with D the mean of the ΔW_i. A
client has C_i, ΔW_i C_i and ΔW_i of its own concept; whoever has their sums has W, and nobody's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.bases.layers import layer, matrix, tunable_layers, where_double
from mixofshow.concepts.changes import Full
from mixofshow.concepts.concept import Concept
from mixofshow.errors import BadInputError
from mixofshow.federation.fixed import CHANGE_UNIT, LIMBS, MOMENT_UNIT, RHS_UNIT, from_limbs, to_limbs
from mixofshow.fusion.problem import LayerProblem, LayerSums
from mixofshow.fusion.recording import Source, record, stage_of
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.solving import solve, solver_for
from mixofshow.fusion.statistics import LayerStatistics, input_of

PIECE: Final = 2**20
"""Numbers that are sent together: Flower takes as long for a small array as for one of 5 MB."""


@dataclass(frozen=True)
class SumsShape:
    """Which layers are summed, in an order that all keep: layers by name, and the names of what they read."""

    layers: tuple[str, ...]
    pipeline: Any

    @classmethod
    def of(cls, pipeline: Any, changed: Sequence[str]) -> SumsShape:
        """Of those layers, in forward order. Raises BadInputError for layers that the base has not."""
        known = tunable_layers(pipeline)
        if unknown := set(changed) - known.keys():
            raise BadInputError(f"this base has no layer {sorted(unknown)[0]}")
        return cls(tuple(name for name in known if name in set(changed)), pipeline)

    @property
    def inputs(self) -> dict[str, int]:
        """What the layers read, with its width."""
        return {input_of(name): self.weight(name).shape[1] for name in self.layers}

    def weight(self, name: str) -> Tensor:
        """The base's weight of a layer, (out, in)."""
        return matrix(layer(self.pipeline, name))

    def parts(self) -> Iterator[tuple[str, tuple[int, int], float]]:
        """Each array that is summed: its name, its shape, and its unit. Of moments only one half is sent."""
        for name, width in self.inputs.items():
            yield f"moments {name}", (width, width), MOMENT_UNIT
        for name in self.layers:
            outputs, inputs = self.weight(name).shape
            yield f"rhs {name}", (outputs, inputs), RHS_UNIT
            yield f"change {name}", (outputs, inputs), CHANGE_UNIT

    def packed(self, terms: Mapping[str, Tensor]) -> list[Tensor]:
        """Terms as limbs, in flat pieces, each sent for itself. Raises BadInputError for numbers that are too large."""
        limbs = []
        for name, _, unit in self.parts():
            numbers = _half(terms[name]) if name.startswith("moments") else terms[name].flatten()
            limbs += to_limbs(numbers, unit)
        return list(torch.cat(limbs).split(PIECE))

    def unpacked(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        """Sums of terms from sums of pieces. Raises BadInputError where they are more or fewer numbers."""
        parts = list(self.parts())
        counts = [size[0] * (size[0] + 1) // 2 if name.startswith("moments") else size[0] * size[1] for name, size, _ in parts]
        joined = torch.cat(list(pieces)) if pieces else torch.empty(0)
        if len(joined) != LIMBS * sum(counts):
            raise BadInputError(f"expected {LIMBS * sum(counts)} sums, found {len(joined)}")
        found = {}
        for (name, size, unit), limbs in zip(parts, joined.split([LIMBS * count for count in counts]), strict=True):
            numbers = from_limbs(limbs.view(LIMBS, -1).unbind(), unit)
            found[name] = _whole(numbers, size[0]) if name.startswith("moments") else numbers.view(size)
        return found


@torch.no_grad()
def own_terms(shape: SumsShape, concept: Concept, settings: FusionSettings) -> dict[str, Tensor]:
    """A concept's own part of every sum. Raises BadInputError."""
    seen = record(shape.pipeline, Source.of(concept, settings), shape.layers, settings)
    terms = {f"moments {name}": seen[name].moments for name in shape.inputs}
    for name in shape.layers:
        change = concept.deltas.get(name)
        moments = seen[input_of(name)].moments
        none = torch.zeros_like(shape.weight(name), dtype=torch.float64)
        terms[f"rhs {name}"] = change.times(moments).matrix() if change else none
        terms[f"change {name}"] = change.matrix(dtype=torch.float64) if change else none
    return terms


def solved(shape: SumsShape, sums: Mapping[str, Tensor], count: int, settings: FusionSettings) -> dict[str, Tensor]:
    """The fused weight (out, in) of each layer, from sums over `count` concepts."""
    weights = {}
    for name in shape.layers:
        own = shape.weight(name)
        problem = LayerProblem(where_double(own), [Full(sums[f"change {name}"] / count)], _nobody, [1.0])
        # What a problem finds by summing over its concepts, it has from the start.
        problem.__dict__["sums"] = LayerSums(sums[f"moments {input_of(name)}"], sums[f"rhs {name}"])
        weights[name] = solve(problem, solver_for(settings, stage_of(name)))[0].to(own.device)
    return weights


def _nobody(number: int) -> LayerStatistics:
    raise AssertionError("no concept's own moments are here")


def _half(moments: Tensor) -> Tensor:
    """The upper half of a symmetric matrix, with its diagonal, flat."""
    rows, columns = torch.triu_indices(*moments.shape)
    return moments[rows, columns]


def _whole(half: Tensor, width: int) -> Tensor:
    rows, columns = torch.triu_indices(width, width)
    made = half.new_zeros(width, width)
    made[rows, columns] = half
    made[columns, rows] = half
    return made
