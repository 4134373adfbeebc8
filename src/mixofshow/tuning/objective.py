"""One batch, from pictures and captions to a loss (Mix-of-Show §3.2, §4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from mixofshow.bases.families import conditions, of_encoders, text_encoders
from mixofshow.concepts.prompts import Ids, encode_variants
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
    """Pictures, noise (batch, channels, height, width), time steps (batch,), token ids."""

    pictures: Pictures
    noise: Tensor
    timesteps: Tensor
    ids: Ids


@dataclass(frozen=True)
class Feed:
    """Pictures with captions, in their order. `tokenize` turns captions into ids.

    `keep` says how many of the first parts of each caption stay when it is shuffled.
    """

    source: Source
    order: Order
    captions: Sequence[str]
    keep: Sequence[int]
    settings: TuningSettings
    tokenize: Callable[[Sequence[str]], Ids]

    def batch(self, number: int, scheduler: Any) -> Batch:
        """Batch `number`, always the same."""
        generator = batch_generator(self.settings.seed, number)
        indices = self.order.batch(number)
        pictures = self.source.draw(indices, generator)
        noise = offset_noise(pictures.latents, self.settings.loss.noise_offset, generator)
        count = scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (len(indices),), generator=generator).to(noise.device)
        captions = [
            varied(self.captions[index], self.settings.placeholder, self.settings.captions, generator, self.keep[index])
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
        self.pipeline, self.unet, self.words = pipeline, pipeline.unet, words
        self.text_encoders = nn.ModuleList(one.model for one in text_encoders(pipeline))
        self.changes, self.settings, self.maps = changes, settings, maps
        self.scheduler = noise_scheduler(pipeline, settings.loss)
        self.first_id = text_encoders(pipeline)[0].first_id
        self.usual_lengths = [one.table.detach().float().norm(dim=-1).mean() for one in text_encoders(pipeline)]

    def forward(self, batch: Batch, prior: Batch | None = None) -> Figures:
        """The loss by its parts; "loss" is their sum."""
        figures = {"denoising": self._denoising_loss(self._predict(batch), batch)}
        if self.maps:
            figures["attention"] = self.settings.loss.attention_weight * self._attention_loss(self.maps, batch)
        if prior is not None:
            figures["prior"] = self.settings.prior.weight * self._denoising_loss(self._predict(prior), prior)
        if self.settings.words.density_weight:
            figures["density"] = self.settings.words.density_weight * self._density_loss()
        return {"loss": torch.stack(list(figures.values())).sum(), **figures}

    def _predict(self, batch: Batch) -> Tensor:
        if self.maps is not None:
            self.maps.clear()
        latents = batch.pictures.latents
        noisy = self.scheduler.add_noise(latents, batch.noise, batch.timesteps)
        text = encode_variants(self.pipeline, batch.ids, self.words())
        hidden = text.hidden[:, 0] if text.hidden.shape[1] == 1 else text.hidden
        return self.unet(noisy, batch.timesteps, hidden, **conditions(self.pipeline, text.pooled, noisy)).sample

    def _denoising_loss(self, made: Tensor, batch: Batch) -> Tensor:
        pictures, settings = batch.pictures, self.settings.loss
        target = denoising_target(self.scheduler, pictures.latents, batch.noise, batch.timesteps)
        mask = pictures.valid * pictures.mask if settings.masked else pictures.valid
        weights = min_snr_weights(self.scheduler, batch.timesteps, settings.min_snr) if settings.min_snr else None
        return masked_mse(made, target, mask, weights)

    def _density_loss(self) -> Tensor:
        """Of each text encoder's part of the words among its own."""
        parts = zip(of_encoders(self.pipeline, self.words()), text_encoders(self.pipeline), strict=True)
        return torch.stack([negative_log_density(part, one.table.to(part)) for part, one in parts]).sum()

    @torch.no_grad()
    def length_of_words(self) -> Tensor:
        """The words' mean length, of what each text encoder reads of them."""
        return torch.stack([part.norm(dim=-1).mean() for part in of_encoders(self.pipeline, self.words())]).mean()

    @torch.no_grad()
    def longest_word(self) -> float:
        """The longest vector, of what each text encoder reads of it, in lengths of that one's own words on average."""
        parts = zip(of_encoders(self.pipeline, self.words()), self.usual_lengths, strict=True)
        return max(float(part.norm(dim=-1).max() / usual) for part, usual in parts)

    def _attention_loss(self, maps: Maps, batch: Batch) -> Tensor:
        """Of the pictures that have a mask and a caption that names the concept, where it is named first."""
        words = self.first_id + torch.arange(self.words().shape[1], device=batch.noise.device)
        named = batch.ids[0][..., None] == words  # (batch, tokens, words)
        rows = (batch.pictures.masked & named.any(1).all(1)).nonzero()[:, 0]
        if not len(rows):
            return batch.noise.new_zeros(())
        positions = named[rows].int().argmax(1)  # of equal ones the first
        of_words = words_attention([_rows(attention, rows, len(named)) for attention in maps], positions)
        return attention_regularization(
            of_words, batch.pictures.mask[rows], full_identity=self.settings.loss.full_identity
        )


def _rows(attention: Tensor, rows: Tensor, batch: int) -> Tensor:
    """The attention of some pictures of a batch, (batch · heads, …) -> (rows · heads, …)."""
    return attention.unflatten(0, (batch, -1))[rows].flatten(0, 1)
