"""One batch, from pictures and captions to a loss (Mix-of-Show §3.2, §4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from mixofshow.concepts.prompts import encode_ids
from mixofshow.tuning.attention import Maps, words_attention
from mixofshow.tuning.batches import Order, Pictures, Source, batch_generator
from mixofshow.tuning.captions import varied
from mixofshow.tuning.changes import Changes
from mixofshow.tuning.losses import (
    attention_regularization,
    denoising_target,
    masked_mse,
    min_snr_weights,
    negative_log_density,
    offset_noise,
)
from mixofshow.tuning.settings import LossSettings, TuningSettings

Figures = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Pictures, noise (batch, channels, height, width), time steps (batch,), token ids (batch, tokens)."""

    pictures: Pictures
    noise: Tensor
    timesteps: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Feed:
    """Pictures with captions, in their order. `tokenize` turns captions into ids, (captions, tokens)."""

    source: Source
    order: Order
    captions: Sequence[str]
    settings: TuningSettings
    tokenize: Callable[[Sequence[str]], Tensor]

    def batch(self, number: int, scheduler: Any) -> Batch:
        """Batch `number`, always the same."""
        generator = batch_generator(self.settings.seed, number)
        indices = self.order.batch(number)
        pictures = self.source.draw(indices, generator)
        noise = offset_noise(pictures.latents, self.settings.loss.noise_offset, generator)
        count = scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (len(indices),), generator=generator).to(noise.device)
        captions = [
            varied(self.captions[index], self.settings.placeholder, self.settings.captions, generator)
            for index in indices
        ]
        return Batch(pictures, noise, timesteps, self.tokenize(captions))


def noise_scheduler(pipeline: Any, settings: LossSettings) -> Any:
    """The base's noise schedule, for training."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if settings.prediction != "auto":
        scheduler.register_to_config(prediction_type=settings.prediction)
    return scheduler


class Objective(nn.Module):
    """Everything that is trained, and the loss of a batch."""

    def __init__(
        self, pipeline: Any, words: nn.Module, changes: Changes, settings: TuningSettings, maps: Maps | None = None
    ) -> None:
        super().__init__()
        self.text_encoder, self.unet, self.words = pipeline.text_encoder, pipeline.unet, words
        self.changes, self.settings, self.maps = changes, settings, maps
        self.scheduler = noise_scheduler(pipeline, settings.loss)
        self.first_id = pipeline.text_encoder.get_input_embeddings().num_embeddings

    def forward(self, batch: Batch, prior: Batch | None = None) -> Figures:
        """The loss by its parts; "loss" is their sum."""
        figures = {"denoising": self._denoising_loss(self._predict(batch), batch)}
        if self.maps:
            figures["attention"] = self.settings.loss.attention_weight * self._attention_loss(self.maps, batch)
        if prior is not None:
            figures["prior"] = self.settings.prior.weight * self._denoising_loss(self._predict(prior), prior)
        if self.settings.words.density_weight:
            table = self.text_encoder.get_input_embeddings().weight
            figures["density"] = self.settings.words.density_weight * negative_log_density(self.words(), table)
        return {"loss": torch.stack(list(figures.values())).sum(), **figures}

    def _predict(self, batch: Batch) -> Tensor:
        if self.maps is not None:
            self.maps.clear()
        latents = batch.pictures.latents
        noisy = self.scheduler.add_noise(latents, batch.noise, batch.timesteps)
        text = encode_ids(self.text_encoder, batch.ids, self.words())
        return self.unet(noisy, batch.timesteps, text[:, 0] if text.shape[1] == 1 else text).sample

    def _denoising_loss(self, made: Tensor, batch: Batch) -> Tensor:
        pictures, settings = batch.pictures, self.settings.loss
        target = denoising_target(self.scheduler, pictures.latents, batch.noise, batch.timesteps)
        mask = pictures.valid * pictures.mask if settings.masked else pictures.valid
        weights = min_snr_weights(self.scheduler, batch.timesteps, settings.min_snr) if settings.min_snr else None
        # All ones is no mask: then the loss is a mean, not the reference's sum over channels.
        return masked_mse(made, target, None if bool((mask == 1).all()) else mask, weights)

    def _attention_loss(self, maps: Maps, batch: Batch) -> Tensor:
        """Of the pictures that have a mask and a caption that names the concept."""
        is_word = batch.ids >= self.first_id
        rows = (batch.pictures.masked & is_word.any(1)).nonzero()[:, 0]
        if not len(rows):
            return batch.noise.new_zeros(())
        count = int(is_word[rows].sum(1).min())
        positions = is_word[rows].int().topk(count, dim=1).indices.sort(1).values
        of_words = words_attention([_rows(attention, rows, len(batch.ids)) for attention in maps], positions)
        return attention_regularization(
            of_words, batch.pictures.mask[rows], full_identity=self.settings.loss.full_identity
        )


def _rows(attention: Tensor, rows: Tensor, batch: int) -> Tensor:
    """The attention of some pictures of a batch, (batch · heads, …) -> (rows · heads, …)."""
    return attention.unflatten(0, (batch, -1))[rows].flatten(0, 1)
