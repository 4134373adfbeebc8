"""The recipe that made the shipped weights: autoencoder, its decoder again, generator, judge, one after the other.

    python -m emojiland pretrain --out FOLDER            one process
    torchrun --nproc-per-node 2 -m emojiland pretrain …  two (on CPU, with OMP_NUM_THREADS=1)

Interrupt it whenever you like; the same command goes on from the newest checkpoint in FOLDER. With `--base emojiland`
and no checkpoint there, generator and decoder go on from the shipped weights; `--generator-steps` and
`--decoder-steps` say for how long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from emojiland import autoencoder, clip, generator
from emojiland.library import Library
from emojiland.pictures import random_picture
from emojiland.training import new_run, train
from mixofshow.bases.emojiland.world import SIZE, WIDE
from mixofshow.bases.loading import EMBEDDED, load_base

WEIGHTS: Final = EMBEDDED["emojiland"]
JUDGE: Final = WEIGHTS.parent / "judge"


@dataclass(frozen=True)
class Recipe:
    """How long and how fast each network learns. Batches are totals over all processes."""

    autoencoder_steps: int = 2600
    autoencoder_batch: int = 32
    autoencoder_rate: float = 2e-3
    generator_steps: int = 5400
    generator_batch: int = 64
    generator_rate: float = 1.5e-3
    cached_shards: int = 48
    cached_wide_shards: int = 16
    decoder_steps: int = 800
    decoder_batch: int = 32
    decoder_rate: float = 1e-3
    judge_steps: int = 8000
    judge_batch: int = 64
    judge_rate: float = 1e-3
    base: str | None = None
    """Base model whose autoencoder, text encoder and UNet decoder and generator begin from; None: the run's autoencoder."""


def pretrain(recipe: Recipe, run: Path, *, stages: tuple[str, ...], minutes: float = 1e9) -> None:
    """Run the named stages in `run`; each finished stage leaves its network there as a diffusers or transformers folder."""
    run.mkdir(parents=True, exist_ok=True)
    accelerator = new_run()
    for name in stages:
        STAGES[name](recipe, run, accelerator, minutes)
        accelerator.wait_for_everyone()


def _autoencoder(recipe: Recipe, run: Path, accelerator: Accelerator, minutes: float) -> None:
    vae, library = autoencoder.build().to(accelerator.device), Library.load(run / "icons")
    stage = autoencoder.stage(
        vae,
        library,
        steps=recipe.autoencoder_steps,
        batch=_share(recipe.autoencoder_batch, accelerator),
        learning_rate=recipe.autoencoder_rate,
    )
    if train(stage, run, accelerator, minutes=minutes) and accelerator.is_main_process:
        autoencoder.balance(vae, library)
        vae.save_pretrained(run / "vae")


def _generator(recipe: Recipe, run: Path, accelerator: Accelerator, minutes: float) -> None:
    library = Library.load(run / "icons")
    pipeline = (load_base(recipe.base) if recipe.base else _fresh_generator(run, library)).to(accelerator.device)
    for part in (pipeline.unet, pipeline.text_encoder):
        part.requires_grad_(True)
    square, wide = (
        generator.LatentCache(
            run / folder,
            partial(random_picture, library=library, width=width),
            pipeline.vae.requires_grad_(False),
            pipeline.tokenizer,
            shards=shards,
            accelerator=accelerator,
        )
        for folder, width, shards in (
            ("latents", SIZE, recipe.cached_shards),
            ("latents-wide", WIDE, recipe.cached_wide_shards),
        )
    )
    stage = generator.stage(
        pipeline,
        square,
        wide,
        steps=recipe.generator_steps,
        batch=_share(recipe.generator_batch, accelerator),
        learning_rate=recipe.generator_rate,
    )
    train(stage, run, accelerator, minutes=minutes)
    if accelerator.is_main_process:
        pipeline.to(dtype=torch.float16).save_pretrained(run / "pipeline")


def _fresh_generator(run: Path, library: Library) -> Any:
    vae = AutoencoderKL.from_pretrained(run / "vae")
    tokenizer = generator.build_tokenizer(library)
    return generator.assemble(vae, generator.build_text_encoder(tokenizer), tokenizer, generator.build_unet())


def _decoder(recipe: Recipe, run: Path, accelerator: Accelerator, minutes: float) -> None:
    known = load_base(recipe.base).vae if recipe.base else AutoencoderKL.from_pretrained(run / "vae")
    vae, library = known.to(accelerator.device), Library.load(run / "icons")
    stage = autoencoder.decoder_stage(
        vae,
        library,
        steps=recipe.decoder_steps,
        batch=_share(recipe.decoder_batch, accelerator),
        learning_rate=recipe.decoder_rate,
    )
    if train(stage, run, accelerator, minutes=minutes) and accelerator.is_main_process:
        vae.save_pretrained(run / "vae")


def _judge(recipe: Recipe, run: Path, accelerator: Accelerator, minutes: float) -> None:
    library = Library.load(run / "icons")
    tokenizer = clip.build_tokenizer(library)
    model = clip.build(tokenizer).to(accelerator.device)
    stage = clip.stage(
        model,
        tokenizer,
        library,
        steps=recipe.judge_steps,
        batch=_share(recipe.judge_batch, accelerator),
        learning_rate=recipe.judge_rate,
    )
    train(stage, run, accelerator, minutes=minutes)
    if accelerator.is_main_process:
        model.half().save_pretrained(run / "judge")
        tokenizer.save_pretrained(run / "judge")


def _share(batch: int, accelerator: Accelerator) -> int:
    return max(1, batch // accelerator.num_processes)


STAGES: Final[dict[str, Any]] = {
    "autoencoder": _autoencoder,
    "decoder": _decoder,
    "generator": _generator,
    "judge": _judge,
}
