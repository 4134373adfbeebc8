"""Peaks of memory on a GPU, from shapes alone: Stable Diffusion 1.5's and SDXL's architectures, without weights or a GPU.

    python benchmarks/memory.py [--json FILE] [--bases sd15,sdxl] [--verbs tune,fuse,refit,sample,evaluate]
    python benchmarks/memory.py --check      # the same reckoning on Emojiland, beside what torch's allocator measures

Each verb is run itself, with its defaults, on a simulated GPU (tests/devices/simulated.py) whose large tensors nobody
computes (hollow.py); what is counted is the bytes of all tensors there at a time. Not counted are what kernels take for
themselves while they run, what the allocator rounds up, and what the driver needs: allow a gigabyte for these.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
import torch
from figures import keep, known
from hollow import Hollow, Ledger, LikeCuda, Metered, MeteredDevice
from PIL import Image
from shapes import random_concept, sd15, sdxl
from torch.profiler import ProfilerActivity, profile

from mixofshow import FusionSettings, MixOfShowPipeline, Region, fuse, load_base, make_settings, tune
from mixofshow.bases.families import family_of
from mixofshow.concepts.adapters import summed_weights
from mixofshow.concepts.concept import Concept, vocabulary
from mixofshow.concepts.model import ConceptModel
from mixofshow.evaluation.tasks import draw
from mixofshow.sampling.settings import Composition
from tests.devices.conftest import simulated

GIGA: Final = 10**9
PICTURES_EACH: Final = 4
"""That an evaluation draws of a prompt."""


def side_of(pipeline: Any) -> int:
    """Of the base's pictures, in pixels."""
    return int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)


def do_tune(pipeline: Any, **changed: Any) -> None:
    """Two steps with the defaults for the base: the second has the optimizer's states."""
    side, precision = side_of(pipeline), {torch.bfloat16: "bf16", torch.float32: "fp32"}[pipeline.unet.dtype]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            Image.new("RGB", (side, side), (number, 99, 99)).save(Path(folder) / f"{number}.png")
        table = {"name": "thing", "class_word": "dog", "data": folder, "base": "random", "precision": precision}
        tune(make_settings({**table, "steps": 2, "save_every": 0, "tracker": "none", **changed}), pipeline)


def do_fuse(pipeline: Any, **settings: Any) -> None:
    """Two concepts, one step of each picture: sums do not grow with steps."""
    fuse(_concepts(pipeline), pipeline, FusionSettings(steps=1, **settings))


def do_sample(pipeline: Any, *, fused: bool = False, **how: Any) -> None:
    """A picture with two regions, by a fused folder, whose weights are its own, or by fused weights beside a base's."""
    concepts = _concepts(pipeline)
    model = ConceptModel(pipeline, vocabulary(concepts), _fused(pipeline, concepts) if fused else {}, concepts)
    draws, side = MixOfShowPipeline.of(model), side_of(pipeline)
    boxes = ((0, 0, side // 2, side), (side // 2, 0, side, side))
    regions = [Region(f"a {one.prompt}", box) for one, box in zip(concepts, boxes, strict=True)]
    draws("a photo", regions=regions, num_inference_steps=3, seed=0, **how)


def do_evaluate(pipeline: Any) -> None:
    """What a suite draws of one prompt with a fused model."""
    concepts = _concepts(pipeline)
    model = ConceptModel(pipeline, vocabulary(concepts), _fused(pipeline, concepts), concepts)
    draw(model, Composition(prompt=f"a {concepts[0].prompt}", steps=2, num=PICTURES_EACH))


def _concepts(pipeline: Any) -> list[Concept]:
    return [random_concept(pipeline, name) for name in ("one", "two")]


def _fused(pipeline: Any, concepts: list[Concept]) -> dict[str, torch.Tensor]:
    return summed_weights(pipeline, [(one.deltas, 0.5) for one in concepts])


VERBS: Final[dict[str, tuple[torch.dtype, Callable[[Any], None]]]] = {
    "tune": (torch.bfloat16, do_tune),
    "tune, no gradient checkpointing": (torch.bfloat16, lambda base: do_tune(base, gradient_checkpointing=False)),
    "tune, gradient checkpointing": (torch.bfloat16, lambda base: do_tune(base, gradient_checkpointing=True)),
    "tune, fp32": (torch.float32, do_tune),
    "fuse": (torch.bfloat16, do_fuse),
    "refit": (torch.bfloat16, lambda base: do_fuse(base, refit=1)),
    "sample": (torch.float16, do_sample),
    "sample, regional_lora": (torch.float16, lambda base: do_sample(base, regional_lora=True)),
    "sample, regional_lora, fused": (torch.float16, lambda base: do_sample(base, regional_lora=True, fused=True)),
    "sample, attend": (torch.float16, lambda base: do_sample(base, attend=0.1)),
    "evaluate": (torch.float16, do_evaluate),
}
"""What is run, and the half precision that suits it."""
BASES: Final[dict[str, Callable[..., Any]]] = {"sd15": sd15, "sdxl": sdxl}


def predicted(base: str, verb: str) -> dict[str, float]:
    """Gigabytes (10⁹ bytes) on the GPU: the base alone, and the peak of the verb."""
    dtype, do = VERBS[verb]
    ledger, tokenizer = Ledger(), load_base("emojiland").tokenizer
    with pytest.MonkeyPatch.context() as patch, Hollow(), LikeCuda(), simulated("cuda", patch, MeteredDevice(ledger)):
        pipeline = _built(BASES[base], dtype, tokenizer)
        held = ledger.now["cuda:0"]
        # What is recorded is written to a disk where there is no room, which has no part in this.
        with _known_by("random"), mock.patch("mixofshow.fusion.stages.ROOM", 2**60):
            do(pipeline)
    return {"base": held / GIGA, "peak": ledger.peak["cuda:0"] / GIGA}


def _built(shape: Callable[..., Any], dtype: torch.dtype, tokenizer: Any) -> Any:
    torch.set_default_dtype(dtype)
    try:
        pipeline = shape(tokenizer).to("cuda")
    finally:
        torch.set_default_dtype(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _known_by(name: str) -> Iterator[None]:
    """Inside, every base has this fingerprint: of weights that are not there none can be taken."""
    modules = ("bases.loading", "concepts.concept", "fusion.stages", "tuning.trainer")
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch(f"mixofshow.{module}.fingerprint", lambda pipeline: name))
        stack.enter_context(mock.patch("shapes.fingerprint", lambda pipeline: name))
        yield


def checked(do: Callable[[Any], None]) -> dict[str, float]:
    """Megabytes on Emojiland, on the CPU: the peak as it is reckoned, and as torch's allocator has it."""
    with _known_by("random"):
        reckoned, ledger = load_base("emojiland"), Ledger()
        with Hollow(), Metered(ledger):
            _touch(reckoned, ledger)
            do(reckoned)
        measured = load_base("emojiland")
        start = Ledger()
        _touch(measured, start)
        do(measured)  # what is made once
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            do(measured)
    return {"reckoned": ledger.peak["cpu"] / 1e6, "measured": (start.now["cpu"] + _grown(profiled)) / 1e6}


def _touch(pipeline: Any, ledger: Ledger) -> None:
    """Note all weights of a base."""
    parts = [getattr(pipeline, part) for part, _ in family_of(pipeline).text_encoders]
    for part in (pipeline.unet, pipeline.vae, *parts):
        for tensor in (*part.parameters(), *part.buffers()):
            ledger.note(tensor, "cpu")


def _grown(profiled: Any) -> int:
    """The most bytes that the allocator had given out since the beginning."""
    events = [one for one in profiled.profiler.kineto_results.events() if one.name() == "[memory]"]
    most = total = 0
    for one in sorted(events, key=lambda one: one.start_ns()):
        total += one.nbytes()
        most = max(most, total)
    return most


def main() -> None:
    """Print a table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bases", default=",".join(BASES))
    parser.add_argument("--verbs", default="", help="those that begin with one of these; default: all")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    found, begun = known(options.json), tuple(options.verbs.split(","))
    for verb, (_, do) in VERBS.items():
        if not verb.startswith(begun):
            continue
        if options.check:
            found[f"check: {verb}"] = row = {key: round(value, 1) for key, value in checked(do).items()}
            print(f"{verb}: " + ", ".join(f"{key} {value} MB" for key, value in row.items()), flush=True)
        for base in () if options.check else options.bases.split(","):
            found.setdefault(verb, {})[base] = gigabytes = round(predicted(base, verb)["peak"], 1)
            print(f"{base}, {verb}: {gigabytes} GB", flush=True)
        keep(found, options.json)


if __name__ == "__main__":
    main()
