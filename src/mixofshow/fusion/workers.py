"""Recording many concepts: one after another here, or side by side in processes and on machines, by Ray.

A concept is recorded by its own model alone, so that each is a task of its own and the results are the same.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import fitted, load_concept
from mixofshow.errors import SettingsError, shown
from mixofshow.fusion.settings import RecordingSettings
from mixofshow.fusion.stages import record_concept
from mixofshow.fusion.store import Recording, Store, open_recording


@dataclass(frozen=True)
class RecordingJob:
    """How concept files are recorded; it is sent to every process, which loads the base for itself."""

    base: str
    settings: RecordingSettings
    store: Store
    device: str = "cpu"
    loading: Mapping[str, Any] = field(default_factory=dict)
    """Further options of `load_base`."""

    def load(self) -> Any:
        """The base model."""
        return load_base(self.base, device=self.device, **self.loading)

    def record(self, path: Path, pipeline: Any) -> Path:
        """Record one file's concept, and say where the recording is. Raises BadInputError."""
        concept = load_concept(path, pipeline)
        return record_concept(concept, pipeline, self.settings, self.store).file.path


def record_all(files: Sequence[Path], job: RecordingJob, *, workers: int = 1) -> Iterator[Recording]:
    """Record concept files in their order; with several workers as many at once, by Ray (extra `ray`).

    If `RAY_ADDRESS` names a cluster its machines do it, and the store must be a folder that all of them see. All files
    are read before the first is recorded. Raises BadInputError, and SettingsError where Ray is missing.
    """
    concepts = [load_concept(path) for path in files]
    pipeline = job.load()
    for path, concept in zip(files, concepts, strict=True):
        fitted(concept, pipeline, str(path))
    made = (job.record(path, pipeline) for path in files) if workers == 1 else _by_ray(files, job, workers)
    return map(open_recording, made)


def _by_ray(files: Sequence[Path], job: RecordingJob, workers: int) -> Iterator[Path]:
    """The same by actors that each have the base."""
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise SettingsError(
            f"workers: {workers} need Ray, which is not installed; pip install 'mixofshow[ray]'"
        ) from error
    cluster = "RAY_ADDRESS" in os.environ
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    with ray.init(num_cpus=None if cluster else workers, **quiet):
        there, own = needs(job, workers, gpus=int(ray.cluster_resources().get("GPU", 0)))
        start = ray.remote(**own)(_Worker).remote
        pool = ActorPool([start(there) for _ in range(workers)])
        try:
            yield from pool.map(lambda worker, path: worker.record.remote(path), [path.absolute() for path in files])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


def needs(job: RecordingJob, workers: int, *, gpus: int) -> tuple[RecordingJob, dict[str, float]]:
    """The job as a worker sees it, and what Ray keeps for each of them. Raises SettingsError where there is no GPU.

    Ray shows a worker the GPUs that it keeps for it, counted from 0, and no others. Where there are fewer than workers,
    they are shared evenly.
    """
    own = {"num_cpus": 1.0}  # a worker that takes a whole processor gets one thread
    if not job.device.startswith("cuda"):
        return job, own
    if not gpus:
        raise SettingsError(f"device '{shown(job.device)}': Ray knows of no GPU; take the CPU, or one worker")
    return replace(job, device="cuda"), {**own, "num_gpus": 1 / math.ceil(workers / gpus)}


class _Worker:
    """What runs in a process of its own."""

    def __init__(self, job: RecordingJob) -> None:
        self.job, self.pipeline = job, job.load()

    def record(self, path: Path) -> Path:
        return self.job.record(path, self.pipeline)
