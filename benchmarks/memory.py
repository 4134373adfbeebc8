"""Peaks of memory: tuning and drawing with Stable Diffusion 1.5's and SDXL's architectures at their own sizes.

    python benchmarks/memory.py [--json FILE] [--jobs tune-sd15,draw-sd15,tune-sdxl,draw-sdxl]

Random weights in bf16, batch 1, ED-LoRA of rank 4, gradient checkpointing, pictures encoded beforehand. Each job runs in
a process of its own on the CPU, two steps long: tuning's second has the optimizer's states. What is printed is the
process's largest resident memory, libraries and Python included, in GiB. `fusion.py` does the same for fusing.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from figures import keep, known
from PIL import Image
from shapes import save_half

from mixofshow.bases.loading import load_base
from mixofshow.concepts.model import ConceptModel
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.tuning.settings import make_settings
from mixofshow.tuning.trainer import tune

SIDES = {"sd15": 512, "sdxl": 1024}
JOBS = [f"{job}-{base}" for base in SIDES for job in ("tune", "draw")]


def do(job: str, folder: Path) -> None:
    """One job with the base in a folder, and what it took."""
    torch.set_flush_denormal(True)
    verb, _, name = job.partition("-")
    pipeline, side = load_base(folder, dtype=torch.bfloat16), SIDES[name]
    if verb == "tune":
        _tune(pipeline, name, side)
    else:
        MixOfShowPipeline.of(ConceptModel(pipeline))("photo of a dog", width=side, height=side, num_inference_steps=2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def _tune(pipeline: Any, name: str, side: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Image.effect_noise((side, side), 100).convert("RGB").save(Path(folder) / "0.png")
        table = {"name": "thing", "class_word": "dog", "data": folder, "base": name, "precision": "bf16", "steps": 2}
        more = {"batch_size": 1, "gradient_checkpointing": True, "save_every": 0, "tracker": "none"}
        tune(make_settings({**table, **more}), pipeline)


def main() -> None:
    """Each job in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--one", nargs=2, metavar=("JOB", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        job, folder = options.one
        do(job, Path(folder))
        return
    found = known(options.json)
    with tempfile.TemporaryDirectory() as bases:
        for job in options.jobs.split(","):
            name = job.partition("-")[2]
            folder = Path(bases) / name
            if not folder.exists():
                save_half(name, folder)
            found[job] = round(float(_in_process(job, folder).splitlines()[-1]), 2)
            print(f"{job}: {found[job]} GiB", flush=True)
            keep(found, options.json)


def _in_process(job: str, folder: Path) -> str:
    command = [sys.executable, __file__, "--one", job, str(folder)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
