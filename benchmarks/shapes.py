"""Real architectures with random weights: their speed and memory need no trained numbers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from mixofshow.bases.families import family_of, token_width
from mixofshow.bases.layers import count_groups, lora_layers, matrix
from mixofshow.bases.loading import fingerprint, load_base
from mixofshow.concepts.concept import Concept, ConceptInfo, LowRank


def sd15() -> Any:
    """Stable Diffusion 1.5 at full width, frozen; the tokenizer is Emojiland's, whose ids are all in the vocabulary."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=load_base("emojiland").tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


BASES = {"sd15": sd15, "emojiland": lambda: load_base("emojiland")}


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
