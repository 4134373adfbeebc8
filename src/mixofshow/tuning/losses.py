"""What tuning minimizes: pure functions of tensors, and the loss of a batch made of them (Mix-of-Show §3.2, §4.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from mixofshow.bases.families import conditions, of_encoders, text_encoders
from mixofshow.bases.layers import cross_attentions
from mixofshow.concepts.prompts import Ids, encode_variants
from mixofshow.tuning.adapters import Adapters
from mixofshow.tuning.settings import LossSettings, TuningSettings

Figures = dict[str, Tensor]
Maps = list[Tensor]
"""Attention of each cross-attention layer, (batch · heads, pixels, tokens)."""


@dataclass(frozen=True)
class Pictures:
    """A batch: latents (batch, channels, height, width); masks (batch, 1, height, width); `masked` (batch,) has a mask."""

    latents: Tensor
    mask: Tensor
    valid: Tensor
    masked: Tensor


@dataclass(frozen=True)
class Batch:
    """Pictures, noise (batch, channels, height, width), time steps (batch,), token ids."""

    pictures: Pictures
    noise: Tensor
    timesteps: Tensor
    ids: Ids


def offset_noise(latents: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    """Noise of the latents' shape (batch, channels, height, width), each channel shifted as a whole by `offset` · N(0, 1)."""
    noise = torch.randn(latents.shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    return noise.to(latents)


def denoising_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model should say: the noise, or the velocity, as its scheduler's `prediction_type` tells."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
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
            smallest = torch.finfo(of_word.dtype).tiny  # half precision may have only 0
            scaled = of_word / of_word.max().clamp(min=smallest)
            if full_identity and word == attention.shape[-1] - 1:
                total = total + functional.mse_loss(scaled, small)
            elif (outside := scaled[small == 0]).numel():
                total = total + outside.mean()
    return total


def negative_log_density(vectors: Tensor, table: Tensor) -> Tensor:
    """Mean of -log p of vectors (…, dim), p being the kernel density of the base's own words, (tokens, dim).

    A Gaussian kernel of the words' mean distance to their center: far vectors are drawn towards the vocabulary,
    near ones hardly. Constants are left out.
    """
    width = (table - table.mean(0)).norm(dim=-1).mean()
    distances = torch.cdist(vectors.flatten(0, -2)[None], table[None])[0] / width
    return -torch.logsumexp(-distances.square() / 2, dim=-1).mean()


@contextlib.contextmanager
def recorded_attention(unet: Any) -> Iterator[Maps]:
    """Inside, every training pass of the UNet appends the attention of its cross-attention layers to the yielded list.

    The backward pass must be inside too: it may compute activations again.
    """
    maps: Maps = []

    def recording(scores: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def get_attention_scores(*arguments: Any) -> Tensor:
            attention = scores(*arguments)
            if torch.is_grad_enabled():
                maps.append(attention)
            return attention

        return get_attention_scores

    layers = list(cross_attentions(unet).values())
    own: list[Any] = [layer.processor for layer in layers]
    try:
        for layer in layers:
            # The fused kernels never hold the attention itself; this processor of diffusers does.
            layer.processor = AttnProcessor()
            layer.get_attention_scores = recording(layer.get_attention_scores)  # type: ignore[arg-type, assignment]
        yield maps
    finally:
        for layer, processor in zip(layers, own, strict=True):
            layer.processor = processor
            vars(layer).pop("get_attention_scores", None)


def words_attention(maps: Maps, positions: Tensor) -> dict[int, Tensor]:
    """By number of pixels, attention averaged over heads and layers at the words' places, (batch, pixels, words).

    positions: (batch, words), where the concept's words stand in each prompt.
    """
    batch, groups = len(positions), dict[int, Maps]()
    for attention in maps:
        heads = rearrange(attention, "(batch heads) pixels tokens -> batch heads pixels tokens", batch=batch)
        groups.setdefault(heads.shape[2], []).append(heads)
    found = {}
    for pixels, of_layers in groups.items():
        mean = torch.cat(of_layers, dim=1).mean(1)
        found[pixels] = torch.gather(mean, 2, positions[:, None, :].expand(-1, pixels, -1))
    return found


def noise_scheduler(pipeline: Any, settings: LossSettings) -> Any:
    """The base's noise schedule, for training."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if settings.prediction != "auto":
        scheduler.register_to_config(prediction_type=settings.prediction)
    return scheduler


class TrainingLoss(nn.Module):
    """Everything that is trained, and the loss of a batch."""

    def __init__(
        self, pipeline: Any, words: nn.Module, adapters: Adapters, settings: TuningSettings, maps: Maps | None = None
    ) -> None:
        super().__init__()
        self.pipeline, self.unet, self.words = pipeline, pipeline.unet, words
        self.text_encoders = nn.ModuleList(one.model for one in text_encoders(pipeline))
        self.adapters, self.settings, self.maps = adapters, settings, maps
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
