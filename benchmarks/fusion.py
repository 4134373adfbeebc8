"""Fusion's exact solution beside the paper's LBFGS on stored activations; its memory; what one more concept costs.

    python benchmarks/fusion.py [--json FILE] [--parts solve,memory,add,scale] [--steps 20]

solve   one layer of every shape of Stable Diffusion 1.5, with the rows of 3 concepts × `--steps` steps at 512²:
        seconds of LBFGS over seconds of the closed form (counting the second moments included), and the largest ratio
        of objectives, closed form over LBFGS; on these layers and on those of tests/goldens
memory  gigabytes that fusing 2 and 4 concepts on that architecture needs above drawing one picture with it
add     seconds of adding a 15th concept to a fused model over seconds of adding the 2nd, the others' recordings kept;
        without refinement, which records all concepts anew behind the fused weights; on Stable Diffusion 1.5's
        architecture, with no more than 4 steps of each picture, and on Emojiland
scale   seconds for each concept, and the process's peak of memory, of fusing 2, 4, … 64 of them on Emojiland

Each measurement of memory runs in a process of its own; all run on the CPU, one after another. Parts that are run by
themselves are added to those in the JSON file.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import keep, known
from safetensors.torch import load_file
from shapes import BASES, random_concept
from torch import Tensor

from mixofshow.concepts.changes import LowRank
from mixofshow.concepts.model import ConceptModel
from mixofshow.fusion.methods import gradient, lbfgs, solve_ridge
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.recording import Source
from mixofshow.fusion.settings import PAPER, FusionSettings
from mixofshow.fusion.stages import fuse, record_concept
from mixofshow.fusion.statistics import MomentAccumulator
from mixofshow.fusion.store import Store
from mixofshow.sampling.pipeline import MixOfShowPipeline

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
CONCEPTS = 3
SMALLEST_RIDGE = 1e-9
TEXT_ROWS = 16 * (7 + 5)
"""Of one concept: the tokens of "photo of a <a> <b>" and of "<a> <b>", in 16 variants."""
WORD_ROWS = 2 * 3
"""Two words and the end of two prompts."""
MEMORY_SETTINGS = FusionSettings(**{**PAPER, "refine": 1}, steps=1, max_memory=0.7)
"""All stages and a pass of refinement, over few prompts and steps: what is kept does not grow with these."""
ADD_STEPS = 4
"""Recording 20 takes many minutes without a GPU, and would make what grows, reading the others', a smaller share."""
LAYERS = {
    # name: (out, in, rows of one concept, or of one of its steps)
    "text encoder": (768, 768, TEXT_ROWS),
    "keys and values, 320": (320, 768, WORD_ROWS),
    "keys and values, 640": (640, 768, WORD_ROWS),
    "keys and values, 1280": (1280, 768, WORD_ROWS),
    "picture, 64²": (320, 320, 64 * 64),
    "picture, 32²": (640, 640, 32 * 32),
    "picture, 16²": (1280, 1280, 16 * 16),
    "picture, 8²": (1280, 1280, 8 * 8),
}


def solve(steps: int) -> dict[str, float]:
    """Ratios of time and objective over one layer of every shape."""
    ours = theirs = 0.0
    worst = _golden_ratio()
    print(f"golden layers: objective, closed form over LBFGS, at most {worst:.6f}", flush=True)
    for name, (outputs, inputs, rows) in LAYERS.items():
        count = rows * (steps if name.startswith("picture") else 1)
        problem, seconds = _problem(outputs, inputs, count)
        started = time.perf_counter()
        exact = gradient(problem, ridge=SMALLEST_RIDGE, toward="base")
        seconds += time.perf_counter() - started
        started = time.perf_counter()
        iterated = lbfgs(problem, iterations=50 if name.startswith("picture") else 500)
        lbfgs_seconds = time.perf_counter() - started
        found, other = problem.sums.objective(exact), problem.sums.objective(iterated)
        both_zero = max(found, other) <= 1e-8 * problem.sums.energy
        ratio = 1.0 if both_zero else found / other
        print(
            f"{name}: {outputs} × {inputs}, {CONCEPTS} × {count} rows: LBFGS {lbfgs_seconds:.2f} s, closed form "
            f"{seconds:.2f} s, {lbfgs_seconds / seconds:.0f} ×; objective ratio {ratio:.6f}",
            flush=True,
        )
        ours, theirs, worst = ours + seconds, theirs + lbfgs_seconds, max(worst, ratio)
    return {"solve_speedup": theirs / ours, "objective_ratio_max": worst}


def _problem(outputs: int, inputs: int, rows: int) -> tuple[LayerProblem, float]:
    """Random concepts of rank 4 on correlated inputs, and the seconds that counting their moments took."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -2, inputs)
    seen, changes, seconds = [], [], 0.0
    for _ in range(CONCEPTS):
        mix = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q
        x = (torch.randn(rows, inputs, generator=generator) * spectrum) @ mix
        changes.append(
            LowRank(torch.randn(4, inputs, generator=generator), 0.01 * torch.randn(outputs, 4, generator=generator))
        )
        moments = MomentAccumulator()
        started = time.perf_counter()
        moments.add("x", x)
        seconds += time.perf_counter() - started
        kept = MomentAccumulator(keep_inputs=True)
        kept.add("x", x)
        seen.append(kept.seen()["x"])
    return LayerProblem(torch.zeros(outputs, inputs), changes, seen.__getitem__, [1.0] * CONCEPTS), seconds


def _golden_ratio() -> float:
    """The closed form's objective over the reference's own LBFGS's, on its stored activations; the largest."""
    stored = load_file(GOLDENS / "e_layers.safetensors")
    ratios = [1.0]
    for name in {key.split("|")[0] for key in stored}:
        x, y, base, iterated = (stored[f"{name}|{part}"].double() for part in ("X", "Y", "W0", "W_lbfgs"))

        def error(weight: Tensor, x: Tensor = x, y: Tensor = y) -> float:
            return float((y - x @ weight.T).square().sum())

        exact = base + solve_ridge(x.T @ x, (y - x @ base.T).T @ x, SMALLEST_RIDGE)
        if max(error(exact), error(iterated)) > 1e-8 * error(base):
            ratios.append(error(exact) / error(iterated))
    return max(ratios)


def memory(steps: int) -> dict[str, float]:
    """Gigabytes above plain sampling, for the larger number of concepts."""
    plain = _peak("sampling", steps)
    peaks = {count: _peak(f"fusing-{count}", steps) for count in (2, 4)}
    print(f"peak: plain sampling {plain:.2f} GB, fusing {peaks} GB", flush=True)
    return {"extra_memory_gb": max(peaks.values()) - plain}


def _peak(what: str, steps: int) -> float:
    return _measured(what, steps)[1]


def _measured(what: str, steps: int) -> tuple[float, float]:
    """Seconds and the peak of memory in GB of one thing, in a process of its own."""
    command = [sys.executable, __file__, "--one", what, "--steps", str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = done.stdout.splitlines()[-1].split()
    return float(seconds), float(peak)


def one(what: str, steps: int) -> None:
    """Do one thing in this process and print its seconds and the peak of memory in GB."""
    does, _, count = what.partition("-")
    if does == "scale":
        seconds = _fused_in_seconds(int(count), steps)
    else:
        pipeline = BASES["sd15"]()
        concepts = [random_concept(pipeline, f"c{number}") for number in range(int(count or 0))]
        draw = MixOfShowPipeline.of(ConceptModel(pipeline))
        seconds = _seconds(
            lambda: (
                fuse(concepts, pipeline, MEMORY_SETTINGS)
                if does == "fusing"
                else draw("photo of a dog", num_inference_steps=2)
            )
        )
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def add(steps: int) -> dict[str, float]:
    """Seconds of adding the 15th concept over seconds of adding the 2nd, by base."""
    return {
        "add_cost_ratio": _added("sd15", min(steps, ADD_STEPS)),
        "add_cost_ratio_emojiland": _added("emojiland", steps),
    }


def _added(base: str, steps: int) -> float:
    """The same on one base. Concepts 3 to 14 are given the 2nd's recording: only reading theirs is measured."""
    pipeline = BASES[base]()
    concepts = [random_concept(pipeline, f"c{number}") for number in range(15)]
    settings = FusionSettings(mode="independent", steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        record_concept(concepts[0], pipeline, settings, store)
        second = _seconds(lambda: fuse(concepts[:2], pipeline, settings, store=store))
        recording = record_concept(concepts[1], pipeline, settings, store)
        seen = {name: recording.statistics(name) for name in recording.info.rows}
        for concept in concepts[2:14]:
            source = Source.of(concept, settings)
            own = {"source": concept.hash, "texts": source.texts, "pictures": source.pictures}
            store.save({**recording.info.key, **own}, source.name, seen)
        del seen
        last = _seconds(lambda: fuse(concepts, pipeline, settings, store=store))
    print(f"{base}: the 2nd added in {second:.2f} s, the 15th in {last:.2f} s: {last / second:.3f} ×", flush=True)
    return last / second


def scale(steps: int) -> dict[str, float]:
    """Seconds for each concept and gigabytes in all, 64 concepts over 2: each fusion is from scratch, in its own process."""
    found = {}
    for count in (2, 4, 8, 16, 32, 64):
        seconds, peak = _measured(f"scale-{count}", steps)
        found[count] = seconds / count, peak
        print(f"{count} concepts: {seconds / count:.2f} s each, peak of memory {peak:.3f} GB", flush=True)
    return {
        "scale_seconds_ratio": found[64][0] / found[2][0],
        "scale_memory_gb_per_concept": (found[64][1] - found[2][1]) / 62,
    }


def _fused_in_seconds(count: int, steps: int) -> float:
    pipeline = BASES["emojiland"]()
    concepts = [random_concept(pipeline, f"c{number}") for number in range(count)]
    return _seconds(lambda: fuse(concepts, pipeline, FusionSettings(steps=steps)))


def _seconds(call: Callable[[], Any]) -> float:
    """Processor time, which other work on the machine leaves alone."""
    started = time.process_time()
    call()
    return time.process_time() - started


PARTS = {"solve": solve, "memory": memory, "add": add, "scale": scale}


def main() -> None:
    """Measure all parts and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    if options.one:
        one(options.one, options.steps)
        return
    figures: dict[str, float] = known(options.json)
    for part in options.parts.split(","):
        figures |= PARTS[part](options.steps)
        keep(figures, options.json)
    print({key: round(value, 6) for key, value in figures.items()})


if __name__ == "__main__":
    main()
