"""Fixtures that every test may use: the tiny golden model, its two concepts, and the numbers to meet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixofshow.bases.loading import fingerprint, load_base
from mixofshow.concepts.concept import DOWN, EMBEDDINGS, UP, Concept, ConceptInfo, LowRank, vocabulary
from mixofshow.concepts.model import ConceptModel

GOLDENS = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Golden:
    """One golden file: its numbers, and the prompts and settings they were made with."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden("a_text")` reads the file a_text.safetensors and what a_text.json says about it."""

    def read(name: str) -> Golden:
        values = json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8")).get("values", {})
        return Golden(load_file(GOLDENS / f"{name}.safetensors"), values)

    return read


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """`relative_error(found, expected)`: the norm of the difference over the norm of what was expected."""

    def error(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        return float((found - expected).double().norm() / expected.double().norm())

    return error


@pytest.fixture(scope="session")
def golden_pipeline() -> Any:
    """The tiny SD-1.x-shaped base of the goldens, with the scheduler that all of them were made with."""
    from diffusers import DPMSolverMultistepScheduler

    pipeline = load_base(GOLDENS / "pipeline")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace", final_sigmas_type="sigma_min"
    )
    return pipeline


@pytest.fixture(scope="session")
def golden_concepts(golden_pipeline: Any) -> tuple[Concept, Concept]:
    """`<dogx1> <dogx2>` and `<manx1> <manx2>`, LoRA scale 1; concepts.json has the scales used for fusion."""
    first, second = json.loads((GOLDENS / "concepts" / "concepts.json").read_text(encoding="utf-8"))
    return _concept(golden_pipeline, first), _concept(golden_pipeline, second)


def _concept(pipeline: Any, entry: dict[str, Any]) -> Concept:
    tensors = load_file(GOLDENS / "concepts" / entry["file"])
    info = ConceptInfo(
        name=Path(entry["file"]).stem,
        words=entry["words"],
        class_word="object",
        initializers=("<rand-0.013>", "object"),
        layers=tensors[EMBEDDINGS].shape[1],
        family="stable-diffusion",
        base="golden",
        base_fingerprint=fingerprint(pipeline),
        settings={"steps": 1000, "lr": 1e-4, "flip": False, "mask": None, "schedule": "linear"},
    )
    layers = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    return Concept(
        info, tensors[EMBEDDINGS], {layer: LowRank(tensors[layer + DOWN], tensors[layer + UP]) for layer in layers}
    )


@pytest.fixture(scope="session")
def golden_fused(
    golden: Callable[[str], Golden], golden_pipeline: Any, golden_concepts: tuple[Concept, Concept]
) -> ConceptModel:
    """The base with the weights that the reference fused from both concepts."""
    weights = {
        name.removesuffix(".weight"): weight
        for name, weight in golden("e_fused").tensors.items()
        if name.endswith(".weight")
    }
    return ConceptModel(golden_pipeline, vocabulary(golden_concepts), weights)
