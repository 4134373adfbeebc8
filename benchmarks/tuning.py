"""Speed and memory of a tuning step: ED-LoRA beside plain LoRA and beside ED-LoRA done naively.

    python benchmarks/tuning.py [--json FILE] [--steps 3] [--bases sd15,emojiland]

Both of ours have the frozen base in bf16, as `mixofshow tune --precision bf16` loads it. Naive is what the paper's
published code does every step: keep the base in fp32 and let autocast round it, encode the pictures, run the text
encoder once per cross-attention layer and picture, and train the whole vocabulary. Each way runs in a process of its
own, one after the other, on the same random pictures, batch 2, rank 4; steps after the first count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from figures import keep
from PIL import Image
from shapes import save_half
from torch import nn

from mixofshow.bases.layers import cross_attentions
from mixofshow.bases.loading import load_base
from mixofshow.concepts.prompts import layerwise
from mixofshow.tuning.adapters import lora_adapters
from mixofshow.tuning.dataset import read_folder
from mixofshow.tuning.losses import denoising_target, masked_mse, noise_scheduler
from mixofshow.tuning.settings import TuningSettings, make_settings
from mixofshow.tuning.trainer import tune
from mixofshow.tuning.transforms import fit

BASES = ("sd15", "emojiland")
WAYS = ("ed-lora", "lora", "naive")
CAPTIONS = ("photo of a <thing>", "a <thing> on the beach, best quality")


def settings_for(base: Path, folder: Path, method: str, steps: int) -> TuningSettings:
    """Two pictures at the base's own size, in bf16."""
    table = {"name": "thing", "class_word": "dog", "data": folder, "base": str(base), "method": method}
    return make_settings({**table, "steps": steps, "batch_size": 2, "precision": "bf16", "save_every": 0})


def pictures(folder: Path, side: int) -> None:
    """Two pictures of noise with captions."""
    for number, caption in enumerate(CAPTIONS):
        noise = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)


def ours(base: Path, method: str, steps: int, folder: Path) -> list[float]:
    """Seconds of each step."""
    marks: list[float] = []
    tune(
        settings_for(base, folder, method, steps),
        load_base(base, dtype=torch.bfloat16),
        progress=lambda *_: marks.append(time.perf_counter()),
    )
    return [after - before for before, after in itertools.pairwise(marks)]


def naive(base: Path, steps: int, folder: Path) -> list[float]:
    """Seconds of each step, done the published way."""
    pipeline, settings = load_base(base), settings_for(base, folder, "ed-lora", steps)
    layers = len(cross_attentions(pipeline.unet))
    first = pipeline.text_encoder.get_input_embeddings().num_embeddings
    pipeline.text_encoder.resize_token_embeddings(first + 2 * layers, mean_resizing=False)
    table = pipeline.text_encoder.get_input_embeddings().weight
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    examples = read_folder(folder, instance_prompt=CAPTIONS[0])
    images = torch.stack(
        [
            fit(one, settings.pictures, size=side, multiple=pipeline.vae_scale_factor, generator=None).picture
            for one in examples
        ]
    )
    ids = torch.tensor([_ids(pipeline, caption, first, layers) for caption in CAPTIONS])  # (pictures, layers, tokens)
    scheduler, marks = noise_scheduler(pipeline, settings.loss), [time.perf_counter()]
    with lora_adapters(pipeline, settings) as adapters, layerwise(pipeline.unet):
        table.requires_grad_(True)
        trained = [table, *(one for adapter in adapters.values() for one in adapter.parameters())]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                latents = pipeline.vae.encode(images).latent_dist.sample() * pipeline.vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(1000, (len(latents),))
                text = pipeline.text_encoder(ids.flatten(0, 1)).last_hidden_state.unflatten(0, ids.shape[:2])
                made = pipeline.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
            masked_mse(made, denoising_target(scheduler, latents, noise, timesteps)).backward()
            table.grad[:first] = 0  # type: ignore[index]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            marks.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(marks[1:])]


def _ids(pipeline: Any, caption: str, first: int, layers: int) -> list[list[int]]:
    tokenizer, length = pipeline.tokenizer, pipeline.text_encoder.config.max_position_embeddings
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in caption.split("<thing>"))
    rows = []
    for layer in range(layers):
        row = [tokenizer.bos_token_id, *before, first + layer, first + layers + layer, *after, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
    return rows


def measure(base: Path, way: str, steps: int) -> None:
    """Print the fastest step in seconds and the peak of memory in MB."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures(folder, 512 if base.name == "sd15" else 64)
        seconds = naive(base, steps, folder) if way == "naive" else ours(base, way, steps, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": min(seconds), "megabytes": peak}))


def main() -> None:
    """Measure every way on every base and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--bases", default=",".join(BASES))
    parser.add_argument("--one", nargs=2, metavar=("BASE", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(Path(options.one[0]), options.one[1], options.steps)
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.bases.split(","):
            base, steps = Path(name), 10 * options.steps
            if name == "sd15":
                base, steps = Path(folder) / name, options.steps
                save_half(name, base)
            figures[name] = compare(base, steps)
    keep(figures, options.json)


def compare(base: Path, steps: int) -> dict[str, float]:
    """The three ratios of one base, printed with what they were made of."""
    found = {way: _in_process(base, way, steps) for way in WAYS}
    ratios = {
        "ed_lora_over_lora": found["ed-lora"]["seconds"] / found["lora"]["seconds"],
        "naive_over_ours": found["naive"]["seconds"] / found["ed-lora"]["seconds"],
        "memory_over_naive": found["ed-lora"]["megabytes"] / found["naive"]["megabytes"],
    }
    print(base.name, {key: round(value, 3) for key, value in ratios.items()}, found, flush=True)
    return ratios


def _in_process(base: Path, way: str, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(base), way, "--steps", str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
