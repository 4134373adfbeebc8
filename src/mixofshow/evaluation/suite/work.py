"""What workers do: tune a concept, fuse a model, draw pictures. What they leave is named by a hash of all that made it.

So a suite that was broken off goes on where it stopped, and suites that share a folder share what they have in common.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.delta import load_delta
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import BadInputError
from mixofshow.evaluation.drawing import draw
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.fusion.store import Store
from mixofshow.outputs import write_text
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.replay import maker_of, resolved, save_picture
from mixofshow.sampling.settings import Composition
from mixofshow.tuning.settings import TuningSettings
from mixofshow.tuning.trainer import tune

VERSION: Final = 2
"""Of how things are made, as far as no setting tells; another one makes everything anew."""


@dataclass(frozen=True)
class Model:
    """What draws: the base, a single concept at some strength, or all that are fused in a delta file.

    `identity` is a hash of all that.
    """

    base: str
    identity: str
    files: tuple[Path, ...] = ()
    delta: Path | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Request:
    """Pictures wanted of a model: `composition.num` of them, in one batch."""

    model: Model
    composition: Composition

    def paths(self, folder: Path) -> list[Path]:
        """Where they are kept."""
        key = digest({"model": self.model.identity, "composition": self.composition.model_dump(mode="json")})
        return [folder / key[:2] / f"{key}-{number}.png" for number in range(self.composition.num)]

    def is_drawn(self, folder: Path) -> bool:
        """True when they are all there."""
        return all(path.is_file() for path in self.paths(folder))

    def pictures(self, folder: Path) -> list[Image.Image]:
        """The pictures. Raises BadInputError for one that is damaged."""
        return [_read(path) for path in self.paths(folder)]


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise BadInputError(f"{path}: cannot be read as a picture; remove it, and it is drawn again") from error


@dataclass(frozen=True)
class TuneJob:
    """A concept to tune into a file."""

    settings: TuningSettings
    target: Path
    device: str


@dataclass(frozen=True)
class FuseJob:
    """Concept files to fuse into a delta file."""

    base: str
    files: tuple[Path, ...]
    settings: FusionSettings
    target: Path
    device: str


@dataclass(frozen=True)
class DrawJob:
    """Pictures to draw with one model into the folder of pictures."""

    model: Model
    requests: tuple[Request, ...]
    folder: Path
    device: str


Job = TuneJob | FuseJob | DrawJob


def work(job: Job) -> None:
    """Do a job; its files appear whole or not at all."""
    if isinstance(job, TuneJob):
        _tune(job)
    elif isinstance(job, FuseJob):
        _fuse(job)
    else:
        _draw(job)


def _tune(job: TuneJob) -> None:
    started = time.monotonic()
    concept = tune(job.settings, _base(job.settings.base, job.device))
    _write_cost(job.target, started, job.device)
    concept.save(job.target)


def _fuse(job: FuseJob) -> None:
    started, pipeline = time.monotonic(), _base(job.base, job.device)
    recordings = job.target.with_suffix("")
    fused = fuse([load_concept(path, pipeline) for path in job.files], pipeline, job.settings, store=Store(recordings))
    _write_cost(job.target, started, job.device)
    fused.model.save_delta(job.target)
    shutil.rmtree(recordings, ignore_errors=True)


def _draw(job: DrawJob) -> None:
    model = _model(job.model, job.device)
    pipeline = MixOfShowPipeline.of(model)
    maker = maker_of(pipeline)
    for request in job.requests:
        images, paths = draw(model, request.composition), request.paths(job.folder)
        for number, (image, path) in enumerate(zip(images, paths, strict=True)):
            save_picture(image, path, resolved(request.composition, pipeline), maker, number)


@lru_cache(maxsize=1)
def _base(name: str, device: str) -> Any:
    return load_base(name, device=device)


@lru_cache(maxsize=1)
def _model(model: Model, device: str) -> ConceptModel:
    pipeline = _base(model.base, device)
    if model.delta:
        delta = load_delta(model.delta)
        delta.check_fits(pipeline, str(model.delta))
        words = {word: delta.vectors[word].to(pipeline.device) for word in delta.info.words}
        return ConceptModel(pipeline, Vocabulary(words, delta.info.aliases), delta.weights(pipeline))
    concepts = [load_concept(path, pipeline) for path in model.files]
    if not concepts:
        return ConceptModel(pipeline)
    return with_concept(pipeline, concepts[0], unet=model.strength, text_encoder=model.strength)


def _write_cost(target: Path, started: float, device: str) -> None:
    """Beside a file, what it cost; memory is the most that the process (or the GPU) has held up to then."""
    cost = {"seconds": round(time.monotonic() - started, 1), "peak_memory_mb": _peak_memory(device)}
    write_text(_cost_file(target), json.dumps(cost) + "\n")


def read_cost(target: Path) -> dict[str, float | None] | None:
    """Seconds and megabytes that a file cost to make; none if it was there already."""
    file = _cost_file(target)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _cost_file(target: Path) -> Path:
    return target.with_suffix(".cost.json")


def _peak_memory(device: str) -> float | None:
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if not find_spec("resource"):  # Windows has none
        return None
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def digest(table: Mapping[str, Any]) -> str:
    """Hex digits over a table of plain values and the version."""
    text = json.dumps({"version": VERSION, **table}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def folder_digest(folders: Iterable[Path]) -> str:
    """Hex digits over the names and bytes of all files in some folders; those that do not exist count as empty."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.glob("*") if path.is_file()):
            found.update(f"{folder.name}/{path.name} {path.stat().st_size} ".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:32]
