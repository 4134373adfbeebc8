"""How the numbers move: optimizers through their own libraries, and the schedule of their rates."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mixofshow.errors import SettingsError
from mixofshow.tuning.settings import OptimizerSettings

Groups = list[dict[str, Any]]


def make_optimizer(settings: OptimizerSettings, groups: Groups) -> Optimizer:
    """The optimizer over parameter groups, each with its own rate. Raises SettingsError when its library is missing."""
    return OPTIMIZERS[settings.name](groups, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay)


def needed_package(settings: OptimizerSettings) -> str | None:
    """The package that the optimizer comes from, None for torch's own."""
    return {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(settings.name)


def make_schedule(settings: OptimizerSettings, optimizer: Optimizer, steps: int) -> LambdaLR:
    """The rates' course over all steps."""
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=settings.warmup, num_training_steps=steps)


def _from_library(module: str, name: str) -> Callable[..., Optimizer]:
    def make(groups: Groups, **options: Any) -> Optimizer:
        try:
            found = getattr(importlib.import_module(module), name)
        except ImportError as error:
            package = module.split(".", maxsplit=1)[0]
            raise SettingsError(f"optimizer {name} is not installed: pip install {package}") from error
        return found(groups, **options)

    return make


OPTIMIZERS: Final[dict[str, Callable[..., Optimizer]]] = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": _from_library("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": _from_library("prodigyopt", "Prodigy"),
}
