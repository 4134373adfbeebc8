"""What tuning minimizes. Pure functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def offset_noise(latents: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    """Noise of the latents' shape (batch, channels, height, width), each channel shifted as a whole by `offset` · N(0, 1)."""
    noise = torch.randn(latents.shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    return noise.to(latents)


def denoising_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model should say: the noise, or the velocity, as its scheduler's `prediction_type` tells."""
    if scheduler.config.prediction_type == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    return noise


def masked_mse(made: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch of Σ(error² · mask) / Σ(mask) for each picture; without a mask, the plain mean.

    made and target: (batch, channels, height, width); mask: (batch, 1, height, width). As in the reference, a mask of
    one channel divides an error of several, so the masked loss is `channels` times the mean per element.
    """
    error = (made.float() - target.float()).square()
    if mask is None:
        return error.mean()
    return ((error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()
