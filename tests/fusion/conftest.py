"""Fixtures of the fusion's tests: more concepts, and the golden model in double precision."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixofshow.concepts.changes import LowRank
from mixofshow.concepts.concept import Concept
from mixofshow.fusion import stages

MakeConcept = Callable[..., Concept]


@pytest.fixture(scope="session")
def random_concept(golden_concepts: tuple[Concept, Concept]) -> MakeConcept:
    """`random_concept("cat", seed=1, scale=10, changes=...)`: as loud as any other at scale 1, in the layers it changes."""

    def make(
        name: str, *, seed: int, scale: float = 1.0, changes: Callable[[str], bool] = lambda name: True
    ) -> Concept:
        golden, generator = golden_concepts[0], torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        deltas = {
            layer: LowRank(normal(4, delta.shape[1]) / delta.shape[1] ** 0.5, scale * 0.1 * normal(delta.shape[0], 4))
            for layer, delta in golden.deltas.items()
        }
        info = golden.info.model_copy(update={"name": name, "words": (f"<{name}1>", f"<{name}2>")})
        embeddings = golden.embeddings.std() * normal(*golden.embeddings.shape)
        kept = {layer: delta for layer, delta in deltas.items() if changes(layer)}
        return dataclasses.replace(golden, info=info, embeddings=embeddings, deltas=kept)

    return make


@pytest.fixture(scope="session")
def double_pipeline(golden_pipeline: Any) -> Any:
    """The golden model in double precision, in which two ways to the same number agree to the last digits."""
    pipeline = copy.deepcopy(golden_pipeline)
    for part in (pipeline.unet, pipeline.text_encoder):
        part.double()
    return pipeline


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sources that are recorded, not found, from here on."""
    names: list[str] = []
    record = stages.record

    def counted(pipeline: Any, source: Any, *args: Any, **options: Any) -> Any:
        names.append(source.name)
        return record(pipeline, source, *args, **options)

    monkeypatch.setattr(stages, "record", counted)
    return names
