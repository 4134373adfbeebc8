"""Real architectures with random weights: their speed and memory need no trained numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mixofshow.bases.families import family_of, text_encoders, token_width
from mixofshow.bases.layers import count_groups, lora_layers, matrix
from mixofshow.bases.loading import fingerprint, load_base
from mixofshow.concepts.changes import LowRank
from mixofshow.concepts.concept import Concept, ConceptInfo


def sd15(tokenizer: Any = None, *, side: int = 512) -> Any:
    """Stable Diffusion 1.5 at full width for pictures of side × side, frozen.

    The tokenizer is Emojiland's, whose ids are all in the vocabulary.
    """
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder(sample_size=side),
        text_encoder=CLIPTextModel(_clip_l()),
        tokenizer=tokenizer or load_base("emojiland").tokenizer,
        unet=UNet2DConditionModel(sample_size=side // 8, cross_attention_dim=768, attention_head_dim=8),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _frozen(pipeline)


def sdxl(tokenizer: Any = None) -> Any:
    """SDXL at full width, frozen, with Emojiland's tokenizer, or another, twice."""
    torch.manual_seed(0)
    tokenizer = tokenizer or load_base("emojiland").tokenizer
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=768 + 1280,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280,
    )
    second = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_autoencoder(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_clip_l()),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    return _frozen(pipeline)


def _autoencoder(**config: Any) -> Any:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        **config,
    )


def _clip_l() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )


def _scheduler() -> Any:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )


def _frozen(pipeline: Any) -> Any:
    for part in (pipeline.unet, pipeline.vae, *(one.model for one in text_encoders(pipeline))):
        part.requires_grad_(False).eval()
    return pipeline


BASES = {"sd15": sd15, "sdxl": sdxl, "emojiland": lambda: load_base("emojiland")}


def save_half(name: str, folder: Path) -> None:
    """Write "sd15" or "sdxl" in half precision, as such bases are shared.

    In a process of its own: those started later inherit the peak of this one's memory.
    """
    subprocess.run([sys.executable, __file__, name, str(folder)], check=True)


def random_concept(pipeline: Any, name: str, *, rank: int = 4) -> Concept:
    """An ED-LoRA that was never tuned: random words, and a random change of every attention layer."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    layers = count_groups(pipeline.unet)
    info = ConceptInfo(
        name=name,
        words=(f"<{name}-1>", f"<{name}-2>"),
        class_word="dog",
        initializers=("random", "dog"),
        layers=layers,
        family=family_of(pipeline).name,
        base="random",
        base_fingerprint=fingerprint(pipeline),
    )

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).half().float()

    changes = {}
    for layer_name, module in lora_layers(pipeline).items():
        outputs, inputs = matrix(module).shape
        changes[layer_name] = LowRank(
            normal(rank, inputs, scale=inputs**-0.5), normal(outputs, rank, scale=0.1 * rank**-0.5)
        )
    return Concept(info, normal(2, layers, token_width(pipeline), scale=0.02), changes)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float16)  # so that the weights are never there in single precision
    {"sd15": sd15, "sdxl": sdxl}[sys.argv[1]]().save_pretrained(sys.argv[2])
