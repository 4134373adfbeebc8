"""What workers do: tune a concept, fuse a model, draw pictures; one after the other, or in several processes at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.delta import load_delta
from mixofshow.concepts.model import ConceptModel, delta_model, with_concept
from mixofshow.errors import ResourceError, SettingsError
from mixofshow.evaluation.requests import BaseSource, DrawnBy, ImageRequest
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.fusion.store import Store
from mixofshow.outputs import write_text
from mixofshow.processes import deaf_children, end_with_parent
from mixofshow.sampling import regions
from mixofshow.sampling.composition import compose
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.replay import Maker, maker_of, resolved, save_picture
from mixofshow.sampling.settings import Composition
from mixofshow.tuning.settings import TuningSettings
from mixofshow.tuning.trainer import tune

Each = Callable[[Callable[[Any], None], Sequence[Any]], Iterator[Any]]
"""Calls a function of every task, and yields the task when it is done, in any order."""


@dataclass(frozen=True)
class TuneTask:
    """A concept to tune into a file."""

    base: BaseSource
    settings: TuningSettings
    target: Path

    def work(self) -> None:
        """Tune; note what it cost."""
        with _measured(self.target, self.base.device):
            concept = tune(self.settings, self.base.load())
        concept.save(self.target)


@dataclass(frozen=True)
class FuseTask:
    """Concept files to fuse into a delta file."""

    base: BaseSource
    files: tuple[Path, ...]
    settings: FusionSettings
    target: Path

    def work(self) -> None:
        """Fuse; note what it cost. Recordings stay until then, so that a task that was broken off goes on."""
        recordings = self.target.with_suffix("")
        with _measured(self.target, self.base.device):
            concepts = [load_concept(path, self.base.load()) for path in self.files]
            fused = fuse(concepts, self.base.load(), self.settings, store=Store(recordings))
        fused.model.save_delta(self.target)
        shutil.rmtree(recordings, ignore_errors=True)


@dataclass(frozen=True)
class DrawTask:
    """Pictures to draw with one model into the folder of pictures."""

    model: DrawnBy
    requests: tuple[ImageRequest, ...]
    folder: Path

    def work(self) -> None:
        """Draw, and keep each request's pictures as they are done."""
        model, maker = _model(self.model)
        pipeline = MixOfShowPipeline.of(model)
        with _without_notices(regions.__name__):
            for request in self.requests:
                images, paths = draw(model, request.composition), request.paths(self.folder)
                for number, (image, path) in enumerate(zip(images, paths, strict=True)):
                    save_picture(image, path, resolved(request.composition, pipeline), maker, number)


Task = TuneTask | FuseTask | DrawTask


@contextlib.contextmanager
def _without_notices(module: str) -> Iterator[None]:
    """Wide pictures' regions are the suite's own: nobody could do anything about a notice of their size."""
    logger = logging.getLogger(module)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def draw(model: ConceptModel, wanted: Composition) -> list[Image.Image]:
    """A composition's pictures, as many in a batch as fit; picture k is made from seed + k."""
    return compose(MixOfShowPipeline.of(model), wanted, at_once=True)


@lru_cache(maxsize=1)
def _model(drawn_by: DrawnBy) -> tuple[ConceptModel, Maker]:
    """The model, and what its pictures say of it; a process keeps those that it had last."""
    model = _loaded(drawn_by)
    return model, maker_of(MixOfShowPipeline.of(model))


def _loaded(drawn_by: DrawnBy) -> ConceptModel:
    pipeline = drawn_by.base.load()
    if drawn_by.delta:
        return delta_model(load_delta(drawn_by.delta), pipeline, str(drawn_by.delta))
    if not drawn_by.concept:
        return ConceptModel(pipeline)
    concept = load_concept(drawn_by.concept, pipeline)
    return with_concept(pipeline, concept, drawn_by.strength)


@contextlib.contextmanager
def _measured(target: Path, device: str) -> Iterator[None]:
    """Inside, a file is made; what that cost is noted beside it."""
    started = time.monotonic()
    yield
    cost = {"seconds": round(time.monotonic() - started, 1), "peak_memory_mb": _peak_memory(device)}
    write_text(target.with_suffix(".cost.json"), json.dumps(cost) + "\n")


def read_cost(target: Path) -> dict[str, float | None] | None:
    """Seconds and megabytes that a file cost to make; none if it was there already.

    Memory is the most that the process (or the GPU) had held up to then.
    """
    file = target.with_suffix(".cost.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _peak_memory(device: str) -> float | None:
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if not find_spec("resource"):  # Windows has none
        return None
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def folder_digest(folders: Iterable[Path]) -> str:
    """Hex digits over the names and bytes of all files in some folders; those that do not exist count as empty."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.glob("*") if path.is_file()):
            found.update(f"{folder.name}/{path.name} {path.stat().st_size} ".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:32]


@contextlib.contextmanager
def process_pool(workers: int) -> Iterator[Each]:
    """So many processes while inside; 1 is this process itself. Raises SettingsError, ResourceError."""
    if workers < 1:
        raise SettingsError(f"workers: expected at least 1, found {workers}")
    if workers == 1:
        yield _one_by_one
        return
    # Forked processes would share locks of torch's threads, and hang.
    spawn = multiprocessing.get_context("spawn")
    stopped = spawn.Event()
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(workers, stopped))

    def each(function: Callable[[Any], None], tasks: Sequence[Any]) -> Iterator[Any]:
        with deaf_children():
            running = {pool.submit(_run, function, task): task for task in tasks}
        for future in as_completed(running):
            future.result()
            yield running[future]

    try:
        yield each
    except BrokenProcessPool as error:
        raise ResourceError("a worker was killed, probably for want of memory; run again with fewer workers") from error
    except KeyboardInterrupt:
        stopped.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(function: Callable[[Any], None], tasks: Sequence[Any]) -> Iterator[Any]:
    for task in tasks:
        function(task)
        yield task


def _start(workers: int, stopped: Event) -> None:
    _stops.append(stopped)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    torch.set_flush_denormal(True)
    end_with_parent()


_stops: list[Event] = []
"""Of a worker: what is set when no more of the tasks that it was sent are to be begun."""


def _run(function: Callable[[Any], None], task: Any) -> None:
    """The task in a worker, where Ctrl-C ends what is at work as it would without workers."""
    if any(stop.is_set() for stop in _stops):
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        function(task)
    except KeyboardInterrupt:
        for stop in _stops:  # before the parent may have come to it
            stop.set()
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
