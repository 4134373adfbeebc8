"""The one loop in which Emojiland's three networks are trained: seeded, resumable, on CPU or GPU.

Batches are functions of (seed, step, process), so resuming needs no data-order state.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)


WARMUP: Final = 100


def new_run() -> Accelerator:
    """Devices and precision of a run, seeded, with nothing left of an earlier run of this process."""
    AcceleratorState._reset_state()
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    # Without `cpu`, processes that torchrun started on a machine without GPU would not know of one another.
    return Accelerator(mixed_precision="bf16" if gpu or bfloat16_pays() else "no", cpu=not gpu)


def bfloat16_pays(side: int = 512) -> bool:
    """Whether this processor multiplies in bfloat16 faster than in single precision, by trying it.

    One without instructions for it takes twenty times as long, and its name does not tell.
    """

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(side, side, dtype=dtype)
        tries = []
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            tries.append(time.perf_counter() - start)
        return min(tries)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def flat_then_down(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Warm up, stay, fall to 0 over the last fifth: a resumed run may be given more or fewer steps than planned."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / (0.2 * steps))))


class KernelMuon(Muon):
    """Muon (Jordan, 2024) over matrices and convolutions, each seen as a matrix (out, in * height * width)."""

    def __init__(self, kernels: Iterable[nn.Parameter], learning_rate: float) -> None:
        self.kernels = list(kernels)
        self.matrices = [nn.Parameter(kernel.detach().flatten(1)) for kernel in self.kernels]
        super().__init__(self.matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on all kernels."""
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            # A view, so that a step on it is one on the kernel; anew each time, since what distributes a model over
            # processes may have moved the kernel elsewhere.
            matrix.data = kernel.detach().flatten(1)
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        super().step(closure)  # type: ignore[no-untyped-call]


def optimizers(model: nn.Module, learning_rate: float) -> tuple[Optimizer, Optimizer]:
    """Muon for what mixes hidden features, AdamW for what is beside them: first and last layers, words, norms, biases."""
    hidden: list[nn.Parameter] = []
    beside: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        outer = re.search(r"embedding|conv_in|conv_out|quant_conv|logit_scale|class_embed", name)
        (beside if outer or parameter.ndim < 2 else hidden).append(parameter)
    return (
        KernelMuon(hidden, learning_rate),
        AdamW(beside, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    )


def down(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Warm up, then fall to 0 in a straight line: the best for a run whose length is known."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, max(0.0, 1 - step / steps)))


@dataclass(frozen=True)
class Stage:
    """What is trained and how. `loss(model, seed)` makes its own batch from the seed."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, int], Tensor]
    preview: Callable[[nn.Module], Image.Image]
    steps: int
    learning_rate: float
    schedule: Callable[[Optimizer, int], LambdaLR] = flat_then_down
    seed: int = 0
    ema_decay: float = 0.999


def train(
    stage: Stage, folder: Path, accelerator: Accelerator, *, minutes: float = 1e9, save_minutes: float = 5
) -> bool:
    """Train up to `stage.steps`, going on from the folder's checkpoint; True when the last step is done.

    Stops early, after saving, once `minutes` have passed. The model ends holding its EMA weights.
    """
    model = stage.model
    pair = optimizers(model, stage.learning_rate)
    schedules = [stage.schedule(optimizer, stage.steps) for optimizer in pair]
    average = EMAModel(model.parameters(), decay=stage.ema_decay, use_ema_warmup=True, power=0.75)
    average.to(accelerator.device)
    parts = {"model": model, "average": average}
    parts |= {f"optimizer-{k}": optimizer for k, optimizer in enumerate(pair)}
    parts |= {f"schedule-{k}": schedule for k, schedule in enumerate(schedules)}
    checkpoint = folder / f"{stage.name}.pt"
    done = _load(checkpoint, parts)
    wrapped = accelerator.prepare_model(model.train())
    started = saved = time.monotonic()
    losses: list[Tensor] = []
    for step in range(done, stage.steps):
        loss = _step(stage, wrapped, pair, accelerator, step)
        for schedule in schedules:
            schedule.step()
        average.step(model.parameters())
        losses.append(loss)
        done, now = step + 1, time.monotonic()
        if done % 50 == 0:
            mean = torch.stack(losses[-50:]).mean().item()
            logger.info("%s %d/%d loss %.4f %.0f s", stage.name, done, stage.steps, mean, now - started)
        out_of_time = _agree(now - started > 60 * minutes, accelerator)
        if out_of_time or now - saved > 60 * save_minutes or done == stage.steps:
            saved = now
            if accelerator.is_main_process:
                _save(checkpoint, parts, done)
                with averaged(average, model):
                    stage.preview(model).save(folder / f"{stage.name}-{done:06d}.png")
        if out_of_time:
            break
    average.copy_to(model.parameters())
    model.eval()
    return done == stage.steps


def _step(
    stage: Stage, model: nn.Module, pair: tuple[Optimizer, Optimizer], accelerator: Accelerator, step: int
) -> Tensor:
    seed = hash((stage.seed, step, accelerator.process_index)) & 0x7FFFFFFF
    with accelerator.autocast():
        loss = stage.loss(model, seed)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in pair:
        optimizer.step()
    model.zero_grad()
    return loss.detach()


@contextlib.contextmanager
def averaged(average: EMAModel, model: nn.Module) -> Iterator[None]:
    """Inside, the model holds its averaged weights."""
    average.store(model.parameters())
    average.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        average.restore(model.parameters())
        model.train()


def _agree(value: bool, accelerator: Accelerator) -> bool:
    """True when it is true in the main process: all processes must stop at the same step."""
    if accelerator.num_processes == 1:
        return value
    flag = torch.tensor(float(value), device=accelerator.device)
    torch.distributed.broadcast(flag, 0)
    return bool(flag.item())


def _save(path: Path, parts: dict[str, Any], step: int) -> None:
    temporary = path.with_suffix(".part")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
    temporary.replace(path)


def _load(path: Path, parts: dict[str, Any]) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])
