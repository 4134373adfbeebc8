"""A machine with two GPUs, real where there is one, and little to do on it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import accelerate.accelerator
import accelerate.state
import pytest
import torch
from PIL import Image

from mixofshow.concepts.concept import Concept
from tests.conftest import pictures_in, short_run
from tests.devices.simulated import SimulatedDevice

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
KEPT = ("text_model.encoder.layers.0.", "mid_block", "down_blocks.0.attentions.0")


@contextlib.contextmanager
def simulated(
    kind: str, patch: pytest.MonkeyPatch, machine: SimulatedDevice | None = None
) -> Iterator[SimulatedDevice]:
    """Inside, this machine has two devices of a kind, or those of `machine`, in which accelerate believes too."""

    def autocast(native_amp: bool = False, autocast_kwargs: Any = None) -> Any:
        kinds = {"fp16": torch.float16, "bf16": torch.bfloat16}
        precision = accelerate.state.AcceleratorState().mixed_precision
        return torch.autocast("cpu", kinds[precision]) if native_amp else contextlib.nullcontext()

    patch.setattr(accelerate.state.PartialState, "default_device", property(lambda _: torch.device(kind)))
    patch.setattr(accelerate.state, "check_cuda_p2p_ib_support", lambda: True)
    patch.setattr(accelerate.accelerator, "get_mixed_precision_context_manager", autocast)
    with machine or SimulatedDevice(kind) as there:
        yield there


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with GPUs: this one, or simulated."""
    if torch.cuda.is_available():
        yield
        return
    with simulated("cuda", monkeypatch):
        yield


@pytest.fixture
def two_gpus(gpu: None) -> None:
    """A machine with two of them."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    """One that counts, wherever this runs."""
    with simulated("cuda", monkeypatch) as machine:
        yield machine


@pytest.fixture
def simulated_mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    """One without double precision, wherever this runs."""
    with simulated("mps", monkeypatch) as machine:
        yield machine


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Any]:
    """`settings(**{key: value, …})`: of two steps, on two pictures with masks."""
    (tmp_path / "masks").mkdir()
    for number in range(2):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (8, 8, 40, 40))
        mask.save(tmp_path / "masks" / f"{number}.png")
    quick = {"steps": 2, "batch_size": 2, "tracker": "none", "save_every": 0, "unet.targets": "keys-and-values"}
    return short_run(pictures_in(tmp_path / "train", "red", "blue"), **quick)


@pytest.fixture
def few(golden_concepts: Sequence[Concept]) -> list[Concept]:
    """Both golden concepts in a few layers of each stage: what is simulated is slow."""

    def cut(concept: Concept) -> Concept:
        deltas = {name: own for name, own in concept.deltas.items() if any(part in name for part in KEPT)}
        return dataclasses.replace(concept, deltas=deltas)

    return [cut(one) for one in golden_concepts]
