"""Sampling: a prompt and regions to pictures. Encode, denoise, decode are three functions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from einops import repeat
from PIL import Image
from torch import Tensor

from mixofshow.concepts.concept import Concept
from mixofshow.concepts.model import ConceptModel, load_model, with_concept
from mixofshow.concepts.prompts import encode_prompts, layerwise
from mixofshow.errors import MixOfShowError, SettingsError
from mixofshow.progress import Progress, silent
from mixofshow.sampling.attention import RegionText, regional
from mixofshow.sampling.regions import Region, as_shares, require_a_cell

STEPS: Final = 25
MAX_STEPS: Final = 1000
MAX_PIXELS: Final = 2**24
MAX_SEED: Final = 2**63


@dataclass(frozen=True)
class EncodedPrompt:
    """Text for every row of a batch: (rows, layers, tokens, dim); with guidance the first half is the negative."""

    text: Tensor
    regions: tuple[RegionText, ...]
    guided: bool


class MixOfShowPipeline:
    """Draws pictures with a model that knows concepts.

    `MixOfShowPipeline(model)` takes a ConceptModel; `MixOfShowPipeline.load(name)` an embedded base, a base
    folder or a fused folder; `MixOfShowPipeline.single(pipeline, concept)` a base with one concept file.
    """

    def __init__(self, model: ConceptModel) -> None:
        self.model = model

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> MixOfShowPipeline:
        """From an embedded base's name, a diffusers folder, or a fused folder."""
        return cls(load_model(name, device=device, dtype=dtype))

    @classmethod
    def single(cls, pipeline: Any, concept: Concept, *, strength: float = 1.0) -> MixOfShowPipeline:
        """From a base model and one concept; strength 0 keeps only its words, 1 is as tuned."""
        return cls(with_concept(pipeline, concept, unet=strength, text_encoder=strength))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        regions: Sequence[Region] = (),
        negative_prompt: str = "",
        width: int | None = None,
        height: int | None = None,
        num_images: int = 1,
        num_inference_steps: int = STEPS,
        guidance_scale: float | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> list[Image.Image]:
        """Pictures, RGB. Picture k of a batch is the one that `seed + k` gives alone (up to rounding).

        Without a guidance scale the base's usual one is taken. Raises RegionError, TokenError, SettingsError.
        """
        base = self.model.pipeline
        scale = self.model.usual_guidance if guidance_scale is None else guidance_scale
        width, height = self._size(width, height)
        _require(1 <= num_inference_steps <= MAX_STEPS, "num_inference_steps", num_inference_steps, f"1 to {MAX_STEPS}")
        _require(num_images >= 1, "num_images", num_images, "at least 1")
        _require(0 <= seed < MAX_SEED, "seed", seed, f"0 to {MAX_SEED - 1}")
        generators = [torch.Generator().manual_seed(seed + k) for k in range(num_images)]
        latents = initial_latents(base, generators, width=width, height=height)
        with self.model.active():
            encoded = encode(
                self.model,
                prompt,
                negative_prompt,
                regions,
                width=width,
                height=height,
                rows=num_images,
                guided=scale != 1.0,
            )
            latents = denoise(
                base,
                latents,
                encoded,
                num_inference_steps=num_inference_steps,
                guidance_scale=scale,
                generators=generators,
                progress=progress,
            )
            return decode(base, latents)

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        base = self.model.pipeline
        usual = base.unet.config.sample_size * base.vae_scale_factor
        width, height = usual if width is None else width, usual if height is None else height
        for name, value in (("width", width), ("height", height)):
            step = base.vae_scale_factor
            allowed = value >= step and value % step == 0 and width * height <= MAX_PIXELS
            legal = max(step, round(value / step) * step)
            _require(allowed, name, value, f"a multiple of {step} such as {legal}, at most {MAX_PIXELS} pixels in all")
        return width, height


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise SettingsError(f"{name}: expected {expected}, found {value}")


def initial_latents(pipeline: Any, generators: Sequence[torch.Generator], *, width: int, height: int) -> Tensor:
    """Noise, one picture per generator: (pictures, channels, height, width) of the latents."""
    factor = pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, height // factor, width // factor)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(pipeline.unet.device, pipeline.unet.dtype)


def encode(
    model: ConceptModel,
    prompt: str,
    negative_prompt: str,
    regions: Sequence[Region],
    *,
    width: int,
    height: int,
    rows: int,
    guided: bool,
) -> EncodedPrompt:
    """All prompts of a composition, layer by layer, repeated for the rows of the batch."""
    factor = model.pipeline.vae_scale_factor
    boxes = [as_shares(region, width=width, height=height) for region in regions]
    for region, box in zip(regions, boxes, strict=True):
        require_a_cell(region, box, columns=width // factor, rows=height // factor)

    def both(positive: str, negative: str) -> Tensor:
        prompts = [negative, positive] if guided else [positive]
        text = encode_prompts(model.pipeline, prompts, model.vocabulary)
        return repeat(text, "sides layers tokens dim -> (sides rows) layers tokens dim", rows=rows)

    texts = tuple(
        RegionText(
            box, both(region.prompt, negative_prompt if region.negative_prompt is None else region.negative_prompt)
        )
        for region, box in zip(regions, boxes, strict=True)
    )
    return EncodedPrompt(both(prompt, negative_prompt), texts, guided)


def denoise(
    pipeline: Any,
    latents: Tensor,
    encoded: EncodedPrompt,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    generators: Sequence[torch.Generator] = (),
    progress: Progress = silent,
) -> Tensor:
    """Noise to clean latents with the pipeline's own scheduler and classifier-free guidance.

    Some schedulers draw noise in every step: picture k's comes from generator k.
    """
    unet, scheduler = pipeline.unet, copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    draws = generators and "generator" in inspect.signature(scheduler.step).parameters
    noise_source = {"generator": list(generators)} if draws else {}
    latents = latents * scheduler.init_noise_sigma
    rows, columns = latents.shape[-2:]
    with layerwise(unet), regional(unet, encoded.regions, columns=columns, rows=rows):
        for step, timestep in enumerate(scheduler.timesteps):
            batch = torch.cat([latents, latents]) if encoded.guided else latents
            noise = unet(scheduler.scale_model_input(batch, timestep), timestep, encoded.text).sample
            if encoded.guided:
                without, with_prompt = noise.chunk(2)
                noise = without + guidance_scale * (with_prompt - without)
            latents = scheduler.step(noise, timestep, latents, **noise_source).prev_sample
            if not torch.isfinite(latents).all():
                raise MixOfShowError(
                    f"sampling: numbers that are not finite appeared at step {step + 1} of {num_inference_steps}"
                )
            progress(step + 1, num_inference_steps, {})
    return latents


def decode(pipeline: Any, latents: Tensor) -> list[Image.Image]:
    """Clean latents to RGB pictures."""
    vae = pipeline.vae
    pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    images: list[Image.Image] = pipeline.image_processor.postprocess(pictures, output_type="pil")
    return images
