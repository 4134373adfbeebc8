"""Emojiland's text-to-image model: a tokenizer and text encoder of its own words, and a UNet of SD 1.x topology."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Final

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from emojiland.autoencoder import LATENT_CHANNELS
from emojiland.library import Library
from emojiland.pictures import random_picture
from emojiland.tokenizer import train_tokenizer
from emojiland.training import Stage
from mixofshow.bases.emojiland.judge import to_tensor, tokenize
from mixofshow.bases.emojiland.world import SIZE, WIDE, Picture
from mixofshow.grids import grid

TEXT_WIDTH: Final = 144
MAX_TOKENS: Final = 48
UNET_CHANNELS: Final = (96, 144, 144, 96)
HEADS: Final = 4
CAPTION_DROPOUT: Final = 0.1
WIDE_SHARE: Final = 0.5
"""How many batches are of wide pictures. They hold fewer, so that they take as long."""
WIDE_BATCH: Final = 0.4
SNR_CAP: Final = 5.0
PREVIEW_PROMPTS: Final = (
    "a photo of a cat on the beach",
    "a photo of an astronaut in the snow",
    "a photo of a guitar in the city",
    "a photo of a police officer at night",
    "a photo of a mushroom in the forest",
    "a photo of a panda under the sea",
    "a photo of a woman and a dog in the mountains",
    "a photo of a house and a cook on a red background",
)
WIDE_PREVIEW_PROMPTS: Final = (
    "a photo of a dog and an astronaut and a cat in the desert",
    "a photo of a house in the snow",
    "a photo of a panda and a guitar on the beach",
    "a photo of a cook and a car and a cook in the city",
)


def build_tokenizer(library: Library) -> CLIPTokenizer:
    """The tokenizer, learned from the world's captions and all that the library names."""
    random = Random(0)
    captions = [random_picture(random, library).caption for _ in range(4000)]
    return train_tokenizer([*captions, *(icon.name for icon in library.icons)], MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of CLIP's kind."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet: three levels with cross-attention and one without, as in Stable Diffusion 1.x."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=UNET_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEADS,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )


def noise_scheduler() -> DDPMScheduler:
    """Stable Diffusion's noise schedule, ending in noise alone (Lin et al., 2024), and so with v-prediction.

    On latents this small the mean colour outlives much noise: a model that was never shown none of it could not
    choose a plain background's colour at the first step.
    """
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as an ordinary pipeline."""
    scheduler = DPMSolverMultistepScheduler.from_config(noise_scheduler().config, timestep_spacing="linspace")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _Generator(nn.Module):
    """Text encoder and UNet together, so that one call can be distributed."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        text = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, timesteps, text).sample


def step_weights(scheduler: DDPMScheduler) -> Tensor:
    """How much the loss counts at each timestep: less where there is little noise.

    Min-SNR weights (Hang et al., 2023) would also turn down the noisiest steps; but on latents this small it is
    there that shapes are decided.
    """
    signal = scheduler.alphas_cumprod
    snr = signal / (1 - signal)
    return (SNR_CAP / (snr + 1)).clamp(max=1)


class LatentCache:
    """Pictures of the world, encoded once: latents in half precision and their captions, in shards on disk."""

    SHARD = 2048

    def __init__(
        self,
        folder: Path,
        picture: Callable[[Random], Picture],
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        *,
        shards: int,
        accelerator: Accelerator,
    ) -> None:
        self.folder, self.picture, self.vae, self.tokenizer = folder, picture, vae, tokenizer
        self.autocast = accelerator.autocast
        process, processes = accelerator.process_index, accelerator.num_processes
        folder.mkdir(parents=True, exist_ok=True)
        for shard in range(process, shards, processes):
            if not self._path(shard).exists():
                self._write(shard)
        mine = [torch.load(self._path(shard), weights_only=True) for shard in range(process, shards, processes)]
        self.latents = torch.cat([part["latents"] for part in mine])
        self.ids = torch.cat([part["ids"] for part in mine])

    def _path(self, shard: int) -> Path:
        return self.folder / f"latents-{shard:04d}.pt"

    @torch.no_grad()
    def _write(self, shard: int) -> None:
        random = Random(shard)
        pictures = [self.picture(random) for _ in range(self.SHARD)]
        images = to_tensor(picture.image for picture in pictures)
        with self.autocast():
            latents = [
                self.vae.encode(part.to(self.vae.device)).latent_dist.mode().float() for part in images.split(64)
            ]
        ids = tokenize(self.tokenizer, [picture.caption for picture in pictures])
        torch.save({"latents": torch.cat(latents).half().cpu(), "ids": ids}, self._path(shard))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random latents (size, channels, height, width) and token ids (size, tokens)."""
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        return self.latents[chosen].float(), self.ids[chosen]


def stage(
    pipeline: StableDiffusionPipeline,
    square: LatentCache,
    wide: LatentCache,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
) -> Stage:
    """v-prediction loss; one caption in ten is dropped for guidance."""
    unet, scheduler = pipeline.unet, noise_scheduler()
    # The plain processor is a third faster than the fused kernel at these small sizes on CPU.
    unet.set_attn_processor(AttnProcessor())
    weights = step_weights(scheduler)
    empty = tokenize(pipeline.tokenizer, [""])

    def loss(model: nn.Module, seed: int) -> Tensor:
        """Of one batch, which the seed decides."""
        generator = torch.Generator().manual_seed(seed)
        is_wide = torch.rand(1, generator=generator).item() < WIDE_SHARE
        count = max(1, round(WIDE_BATCH * batch)) if is_wide else batch
        latents, ids = (wide if is_wide else square).batch(count, generator)
        dropped = torch.rand(count, 1, generator=generator) < CAPTION_DROPOUT
        ids = torch.where(dropped, empty, ids)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(len(weights), (count,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        device = unet.device
        made = model(noisy.to(device), timesteps.to(device), ids.to(device))
        errors = (made.float() - target.to(device)).square().mean((1, 2, 3))
        return (errors * weights[timesteps].to(device)).mean()

    return Stage(
        "generator",
        _Generator(pipeline.text_encoder, unet),
        loss,
        lambda model: preview(pipeline),
        steps,
        learning_rate,
        ema_decay=0.9995,
    )


def preview(pipeline: StableDiffusionPipeline) -> Image.Image:
    """Square and wide pictures of fixed prompts."""
    rows = [
        grid(_draw(pipeline, [prompt for prompt in PREVIEW_PROMPTS for _ in range(2)], SIZE), columns=16),
        grid(_draw(pipeline, WIDE_PREVIEW_PROMPTS, WIDE), columns=6),
    ]
    return grid(rows, columns=1)


def _draw(pipeline: StableDiffusionPipeline, prompts: Sequence[str], width: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    made = pipeline(
        list(prompts), num_inference_steps=20, guidance_scale=4.0, generator=generator, height=SIZE, width=width
    )
    return made.images
