"""Emojiland's two controls, a T2I-Adapter and a ControlNet: both draw sprites where white silhouettes lie on black.

They learn beside the frozen base, on pictures whose sprites stand anywhere, not only where pre-training had them.
Both are diffusers' own classes with small configs, so plain diffusers loads them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn

from emojiland.autoencoder import to_images
from emojiland.generator import CAPTION_DROPOUT, WIDE_BATCH, step_weights
from emojiland.training import Stage, flat_then_down, new_run, train
from mixofshow.bases.emojiland.judge import to_tensor, tokenize
from mixofshow.bases.emojiland.world import (
    KNOWN_SCENES,
    SIZE,
    WIDE,
    Picture,
    Placement,
    compose,
    paste,
    random_subjects,
)
from mixofshow.grids import grid

WIDE_SHARE: Final = 0.4
"""How many batches are of wide pictures."""
LARGEST_SIDE: Final = 0.8
"""Side of the largest sprite as a share of the picture's height."""
PREVIEWED: Final = 8


@dataclass(frozen=True)
class Layout:
    """A picture and the silhouettes of its sprites, RGB, white on black."""

    picture: Picture
    sketch: Image.Image


def scattered(random: Random, count: int, *, width: int = SIZE) -> list[Placement]:
    """Places for `count` sprites, left to right, each anywhere in its own share of the width."""
    share = width / count
    largest = min(share, LARGEST_SIDE * SIZE)
    laid = []
    for k in range(count):
        side = round(largest * random.uniform(0.55, 0.95))
        x = random.uniform(share * k + side / 2, share * (k + 1) - side / 2)
        laid.append(Placement(x, random.uniform(side / 2, SIZE - side / 2), side, tilt=random.uniform(-8, 8)))
    return laid


def silhouettes(subjects: Sequence[Image.Image], laid: Sequence[Placement], *, width: int = SIZE) -> Image.Image:
    """The sprites' outlines filled with white on black, RGB."""
    sketch = Image.new("RGB", (width, SIZE))
    for subject, place in zip(subjects, laid, strict=True):
        white = Image.new("RGBA", subject.size, "white")
        white.putalpha(subject.getchannel("A"))
        paste(sketch, white, place)
    return sketch


def random_layout(
    random: Random, *, width: int = SIZE, count: int | None = None, scenes: Sequence[str] = tuple(KNOWN_SCENES)
) -> Layout:
    """Sprites scattered over any scene; without a `count` up to two, up to three in a wide picture."""
    count = count or random.choice((1, 1, 2) if width == SIZE else (1, 2, 3, 3))
    subjects = random_subjects(random, count)
    laid = scattered(random, count, width=width)
    picture = compose(subjects, random.choice(scenes), random, width=width, laid=laid)
    return Layout(picture, silhouettes([sprite for _, sprite in subjects], laid, width=width))


def build_adapter(unet: UNet2DConditionModel) -> T2IAdapter:
    """An untrained T2I-Adapter: one feature map for each of the UNet's levels, at its size and width."""
    return T2IAdapter(
        channels=list(unet.config.block_out_channels),
        num_res_blocks=2,
        downscale_factor=SIZE // unet.config.sample_size,
    )


def build_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet of the UNet's widths, beginning from its convolutions, without attention.

    Attention is half of an encoder's weights, and to follow an outline takes neither text nor a wide view; without
    it the residuals still fit the UNet's one for one.
    """
    controlnet = ControlNetModel(
        in_channels=unet.config.in_channels,
        block_out_channels=unet.config.block_out_channels,
        down_block_types=("DownBlock2D",) * len(unet.config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        norm_num_groups=unet.config.norm_num_groups,
        cross_attention_dim=unet.config.cross_attention_dim,
        attention_head_dim=unet.config.attention_head_dim,
        conditioning_embedding_out_channels=(16, 32, 64),
    )
    own = controlnet.state_dict()
    controlnet.load_state_dict({name: value for name, value in unet.state_dict().items() if name in own}, strict=False)
    return controlnet


Residuals = dict[str, Any]
"""Keyword arguments for the UNet."""


def adapter_residuals(adapter: nn.Module, sketch: Tensor, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Residuals:
    """What a T2I-Adapter adds to the UNet."""
    return {"down_intrablock_additional_residuals": adapter(sketch)}


def controlnet_residuals(
    controlnet: nn.Module, sketch: Tensor, noisy: Tensor, timesteps: Tensor, text: Tensor
) -> Residuals:
    """What a ControlNet adds to the UNet."""
    down, mid = controlnet(noisy, timesteps, text, sketch, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


@dataclass(frozen=True)
class Kind:
    """A kind of control: how it is built, what it adds to the UNet, how it is drawn with, how fast it learns."""

    build: Callable[[UNet2DConditionModel], Any]
    residuals: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Residuals]
    drawing: Callable[[Any, Any], Any]
    learning_rate: float


KINDS: Final = {
    "t2i-adapter": Kind(
        build_adapter,
        adapter_residuals,
        lambda base, adapter: StableDiffusionAdapterPipeline.from_pipe(base, adapter=adapter),
        1e-3,
    ),
    "controlnet": Kind(
        build_controlnet,
        controlnet_residuals,
        lambda base, controlnet: StableDiffusionControlNetPipeline.from_pipe(base, controlnet=controlnet),
        5e-4,
    ),
}


def train_control(name: str, base: Any, run: Path, *, steps: int, batch: int = 16, minutes: float = 1e9) -> bool:
    """Train a control of the named kind in `run`, going on from its checkpoint; True when the last step is done.

    Either way `run`/`name` then holds the network, in half precision.
    """
    run.mkdir(parents=True, exist_ok=True)
    accelerator = new_run()
    network = KINDS[name].build(base.unet)
    done = train(
        stage(name, base.to(accelerator.device), network.to(accelerator.device), steps, batch),
        run,
        accelerator,
        minutes=minutes,
    )
    if accelerator.is_main_process:
        network.half().save_pretrained(run / name)
    return done


def stage(name: str, base: Any, network: nn.Module, steps: int, batch: int) -> Stage:
    """The generator's loss, with the base frozen; timesteps are drawn as for T2I-Adapter (Mou et al., 2023, §3.4).

    1 - u³ of the way to full noise: a layout is decided early in sampling.
    """
    kind, unet = KINDS[name], base.unet
    scheduler = DDPMScheduler.from_config(base.scheduler.config)  # the noise that the base was trained with
    # The plain processor is a third faster than the fused kernel at these small sizes on CPU.
    unet.set_attn_processor(AttnProcessor())
    weights, empty = step_weights(scheduler), tokenize(base.tokenizer, [""])

    def loss(model: nn.Module, seed: int) -> Tensor:
        """Of one batch, which the seed decides."""
        random, generator = Random(seed), torch.Generator().manual_seed(seed)
        wide = random.random() < WIDE_SHARE
        count = max(1, round(WIDE_BATCH * batch)) if wide else batch
        layouts = [random_layout(random, width=WIDE if wide else SIZE) for _ in range(count)]
        ids = tokenize(base.tokenizer, [layout.picture.caption for layout in layouts])
        ids = torch.where(torch.rand(count, 1, generator=generator) < CAPTION_DROPOUT, empty, ids).to(unet.device)
        with torch.no_grad():
            pictures = to_tensor(layout.picture.image for layout in layouts)
            latents = base.vae.encode(pictures.to(unet.device)).latent_dist.mode()
            text = base.text_encoder(ids).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        total = len(weights)
        timesteps = ((1 - torch.rand(count, generator=generator) ** 3) * total).long().clamp(max=total - 1)
        moments = timesteps.to(unet.device)
        noisy = scheduler.add_noise(latents, noise, moments)
        made = unet(noisy, moments, text, **kind.residuals(model, _conditions(layouts).to(noisy), noisy, moments, text))
        errors = (made.sample.float() - scheduler.get_velocity(latents, noise, moments)).square().mean((1, 2, 3))
        return (errors * weights[timesteps].to(unet.device)).mean()

    return Stage(
        name,
        network,
        loss,
        lambda model: preview(kind.drawing(base, network)),
        steps,
        kind.learning_rate,
        flat_then_down,
    )


def _conditions(layouts: Sequence[Layout]) -> Tensor:
    """Sketches as networks see them: (pictures, 3, height, width) in [0, 1]."""
    return (to_tensor(layout.sketch for layout in layouts) + 1) / 2


def preview(pipeline: Any) -> Image.Image:
    """Sketches that no training step sees, and below each what is drawn."""
    rows = []
    for width, columns in ((SIZE, PREVIEWED), (WIDE, PREVIEWED // 2)):
        random = Random(-width)
        layouts = [random_layout(random, width=width) for _ in range(columns)]
        rows.append(grid([*(layout.sketch for layout in layouts), *draw(pipeline, layouts)], columns=columns))
    return grid(rows, columns=1)


@torch.no_grad()
def draw(
    pipeline: Any, layouts: Sequence[Layout], *, steps: int = 20, guidance_scale: float = 4.0
) -> list[Image.Image]:
    """Pictures of layouts of one size by a Kind's `drawing`, picture k from seed k."""
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        [layout.picture.caption for layout in layouts],
        image=[layout.sketch for layout in layouts],
        width=layouts[0].sketch.width,
        height=SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(layouts))],
        output_type="latent",
    ).images
    vae = pipeline.vae
    return to_images(vae.decode(latents / vae.config.scaling_factor).sample)
