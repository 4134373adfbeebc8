"""Killed at any point, nothing is half written, and the same again gives what an unbroken run gives, bit for bit.

Covers F29, F34, G2 and G3 (what is left, and swept) for tuning, recording, fusing and sampling.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# One process imports torch and makes the references; what is killed are forks of it: half of them after some time, half
# at a call of the system by which outputs become whole.
KILLS = '''
import os, random, signal, sys, time
from pathlib import Path
import torch
from PIL import Image
from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import load_concept
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse, record_concept
from mixofshow.fusion.store import Store
from mixofshow.outputs import check_outputs
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.replay import maker_of, save_picture
from mixofshow.sampling.settings import Composition
from mixofshow.tuning.checkpoints import newest
from mixofshow.tuning.settings import make_settings
from mixofshow.tuning.trainer import tune

torch.set_num_threads(1)  # a forked process would wait for threads that it did not inherit
goldens, place, count, numbers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
base = load_base(goldens / "pipeline")
few = FusionSettings(steps=1, prompts=("a {}",), refine=0)
SAVED = 2

(place / "pictures").mkdir()
Image.new("RGB", (16, 16), "red").save(place / "pictures" / "0.png")
settings = make_settings({
    "name": "thing", "class_word": "man", "base": str(goldens / "pipeline"), "data": place / "pictures", "steps": 6,
    "batch_size": 1, "save_every": SAVED, "tracker": "none", "pictures.size": 64,
})

def run_tune(folder):
    def note(step, total, info):
        (place / "done").write_text(str(step))
    save = lambda concept: concept.save(folder / "thing.safetensors")
    tune(settings, base, folder=folder / "thing", resume=True, progress=note, finished=save)

def run_record(folder):
    check_outputs(shared=[folder])
    for few_steps in (few, few.model_copy(update={"seed": 1})):
        record_concept(concepts[0], base, few_steps, Store(folder))

def run_fuse(folder):
    check_outputs(folders=[folder / "fused"], shared=[folder / "kept"])
    fuse(concepts, base, few, store=Store(folder / "kept")).model.save(folder / "fused")

def run_sample(folder):
    drawn = Composition(prompt="a man", steps=1, width=64, height=64)
    draw = MixOfShowPipeline.single(base, concepts[0])
    for seed in range(3):
        image = draw("a man", seed=seed, num_inference_steps=1, width=64, height=64)[0]
        save_picture(image, folder / f"{seed}.png", drawn.model_copy(update={"seed": seed}), maker_of(draw))

RUNS = [run_tune, run_fuse, run_sample, run_record]

def seen(folder):
    """Everything that has a name to be seen, but checkpoints, of which only the newest ones stay."""
    paths = {path: path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for path, name in paths.items()
        if "checkpoints" not in name.parts and not any(part.startswith(".mixofshow-") and part.endswith(".tmp") for part in name.parts)
    }

run_tune(place / "first")
concepts = [load_concept(place / "first" / "thing.safetensors")]
wholes, spans, calls = {}, {}, {}
fsync = os.fsync
for run in RUNS:
    made = []
    os.fsync = lambda file: (made.append(file), fsync(file))
    started = time.monotonic()
    run(place / run.__name__)
    spans[run], calls[run] = time.monotonic() - started, len(made)
    os.fsync = fsync
    wholes[run] = seen(place / run.__name__)

def die_at(call):
    left = iter(range(call))
    def counted(file):
        fsync(file)
        if next(left) == call - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = counted

for number in range(count):
    run, folder = RUNS[number % len(RUNS)], place / str(number)
    by_time = (number + number // len(RUNS)) % 2 == 0
    (place / "done").write_text("0")
    process = os.fork()
    if not process:
        if not by_time:
            die_at(numbers.randint(1, calls[run]))
        run(folder)
        time.sleep(600)
    if by_time:
        time.sleep(numbers.uniform(0, spans[run]))
        os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    for name, content in seen(folder).items() if folder.exists() else ():
        assert content == wholes[run][name], (run, name)
    if run is run_tune:
        found = newest(folder / "thing" / "checkpoints")
        step = int(found.stem.removeprefix("step-")) if found else 0
        assert int((place / "done").read_text() or 0) - step <= SAVED or (folder / "thing.safetensors").exists()
    elif run is run_fuse and (folder / "fused").exists():
        assert seen(folder / "fused") == seen(place / "run_fuse" / "fused")
    run(folder)
    assert seen(folder) == wholes[run], run
    assert not list(folder.rglob(".mixofshow-*.tmp")), run
    print(number, run.__name__)
'''
GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize(
    ("count", "seed"), [(6, 0), pytest.param(50, 1, marks=pytest.mark.slow)], ids=["six", "fifty at night"]
)
def test_killed_and_begun_again_is_as_if_never_killed(tmp_path, count, seed):
    arguments = [sys.executable, "-c", KILLS, str(GOLDENS), str(tmp_path), str(count), str(seed)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == count, done.stderr[-3000:]
