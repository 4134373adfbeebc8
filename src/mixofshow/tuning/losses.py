"""What tuning minimizes. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional


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


def min_snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (Hang et al., arXiv:2303.09556, eq. 6) for what the scheduler predicts, (batch,).

    min(SNR, γ) / SNR for noise; for the velocity the same over SNR + 1. Where nothing of the picture is left, the SNR is
    0 and the first of them is 1.
    """
    snr = compute_snr(scheduler, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def masked_mse(made: Tensor, target: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the batch of Σ(error² · mask) / Σ(mask) for each picture; a mask of ones is none.

    made and target: (batch, channels, height, width); mask: (batch, 1, height, width); weights: (batch,), of pictures.
    As in the reference, a mask of one channel divides an error of several, with a mask or without one, so the loss is
    `channels` times the mean per element.
    """
    error = (made.float() - target.float()).square()
    of_picture = (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1e-6)
    return (of_picture if weights is None else weights * of_picture).mean()


def attention_regularization(maps: Mapping[int, Tensor], masks: Tensor, *, full_identity: bool) -> Tensor:
    """How far the words' attention strays from where the concept is, summed over resolutions (Mix-of-Show, appendix).

    maps: by number of pixels, attention of the concept's words averaged over heads and layers, (batch, pixels, words),
    the class word last; masks: (batch, 1, height, width). Every word's map, divided by its maximum over the batch,
    should be 0 outside the mask; with `full_identity` that of the class word should be the mask itself.
    """
    height, width = masks.shape[-2:]
    total = masks.new_zeros(())
    for pixels, attention in maps.items():
        rows = round((pixels * height / width) ** 0.5)
        small = functional.interpolate(masks, size=(rows, pixels // rows), mode="nearest").flatten(1)
        for word, of_word in enumerate(attention.float().unbind(-1)):
            scaled = of_word / of_word.max().clamp(
                min=torch.finfo(of_word.dtype).tiny
            )  # half precision may have only 0
            is_class_word = word == attention.shape[-1] - 1
            total = total + (
                functional.mse_loss(scaled, small) if full_identity and is_class_word else _mean(scaled[small == 0])
            )
    return total


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.sum()


def negative_log_density(vectors: Tensor, table: Tensor) -> Tensor:
    """Mean of -log p of vectors (…, dim), p being the kernel density of the base's own words, (tokens, dim).

    A Gaussian kernel of the words' mean distance to their center: far vectors are drawn towards the vocabulary,
    near ones hardly. Constants are left out.
    """
    width = (table - table.mean(0)).norm(dim=-1).mean()
    distances = torch.cdist(vectors.flatten(0, -2)[None], table[None])[0] / width
    return -torch.logsumexp(-distances.square() / 2, dim=-1).mean()
