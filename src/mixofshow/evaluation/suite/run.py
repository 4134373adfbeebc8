"""Runs a suite: tune, fuse, draw what is not there yet; look at all of it; write the report."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch

from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.bases.loading import EMBEDDED, fingerprint, load_base, scheduler_settings
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BadInputError, SettingsError, shown
from mixofshow.evaluation.protocol import references_of
from mixofshow.evaluation.scorers import ImageTower, dino_scorer, imagenet_scorer, scorer_for
from mixofshow.evaluation.suite.index import NAME as INDEX
from mixofshow.evaluation.suite.index import write_index
from mixofshow.evaluation.suite.measure import Eye, Pictures, look
from mixofshow.evaluation.suite.page import suite_page
from mixofshow.evaluation.suite.plan import Models, Plan, make_plan
from mixofshow.evaluation.suite.results import Judges, results_of, write_results
from mixofshow.evaluation.suite.settings import ConceptEntry, MethodEntry, Suite
from mixofshow.evaluation.suite.work import (
    DrawJob,
    FuseJob,
    Job,
    Model,
    TuneJob,
    digest,
    folder_digest,
    read_cost,
    work,
)
from mixofshow.evaluation.suite.workforce import Each, workforce
from mixofshow.outputs import check_outputs, refusals
from mixofshow.progress import Progress, silent
from mixofshow.tuning.settings import with_presets

CHUNK: Final = 12
"""Requests that a worker takes at once: they share the time to put their model together."""

Bars = Callable[[str], contextlib.AbstractContextManager[Progress]]
"""`bars("drawing")` is the progress of one part of the run."""


@contextlib.contextmanager
def no_bars(label: str) -> Iterator[Progress]:
    """Progress that nobody watches."""
    yield silent


def run_suite(
    suite: Suite, out: Path, *, workers: int = 1, device: str = "cpu", bars: Bars = no_bars
) -> dict[str, Any]:
    """Results of a suite; also in `out` as results.json, results.csv and report.html.

    What was tuned, fused and drawn is kept in `out`/cache, and taken from there by the next run. Raises BadInputError,
    ResourceError.
    """
    cache = out / "cache"
    _check_outputs(suite, out, cache)
    with workforce(workers) as each:
        run = _Run(suite, cache, device, each, bars)
        suite = run.suite
        folders = {one.name: _folder(one, cache) for one in suite.concepts}
        scorer = scorer_for(suite.base, suite.clip, device=device)  # before anything that takes long
        others = _other_judges(suite, device)
        images = {
            part: {name: references_of(folder / part) for name, folder in folders.items()}
            for part in ("reference", "train")
        }
        files = run.tuned(folders)
        plan = run.plan(files)
        run.draw(plan)

    def eye(tower: Any) -> tuple[Eye, Pictures]:
        return Eye(tower, run.pictures), Pictures(look(tower, images["reference"]), look(tower, images["train"]))

    with bars("measuring"):
        judges = Judges(scorer, *eye(scorer.images), {measure: eye(tower) for measure, tower in others.items()})
        results = results_of(suite, plan, judges)
    results |= {"cost": run.costs(files), "machine": _machine(workers, device)}
    write_results(results, out)
    write_index(plan, run.pictures, {name: folder / "reference" for name, folder in folders.items()}, out)
    suite_page(suite, results, plan, run.pictures, images).save(out / "report.html")
    return results


def _other_judges(suite: Suite, device: str) -> dict[str, ImageTower]:
    judges = {"dino_alignment": dino_scorer(suite.dino, device=device)} if suite.dino else {}
    return judges | ({"imagenet_alignment": imagenet_scorer(device=device)} if suite.imagenet else {})


def _check_outputs(suite: Suite, out: Path, cache: Path) -> None:
    read = [file for one in suite.concepts for file in (one.folder, *one.files.values())]
    base = [] if suite.base in EMBEDDED else [Path(suite.base)]
    files = [out / name for name in ("results.json", "results.csv", "report.html", INDEX)]
    check_outputs(files=files, shared=[cache], inputs=[*read, *base])
    if there := [] if cache.is_dir() else [path for path in files if path.exists()]:
        raise BadInputError(
            f"{shown(there[0], 100)}: is there and of no suite, for there is no cache; choose another --out"
        )


def _folder(concept: ConceptEntry, cache: Path) -> Path:
    """The concept's pictures; Emojiland's own are drawn."""
    if concept.folder:
        return concept.folder
    folder = cache / "emojiland" / concept.name
    with refusals(folder):
        write_concept(concept.name, folder)
    return folder


def _machine(workers: int, device: str) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "workers": workers,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


Files = Mapping[str, Mapping[str, Path]]
"""Concept files by method and concept."""


@dataclass
class _Run:
    """A run under way: what it is of, and where things are kept. `fingerprint` is of all of the base that draws."""

    suite: Suite
    cache: Path
    device: str
    each: Each
    bars: Bars
    hashes: dict[Path, str] = field(default_factory=dict)
    fusions: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pipeline = load_base(self.suite.base)
        if self.suite.guidance_scale is None:  # said in so many words, pictures and results tell of it
            usual = ConceptModel(pipeline).usual_guidance
            self.suite = self.suite.model_copy(update={"guidance_scale": usual})
        self.side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        self.fingerprint = digest({"weights": fingerprint(pipeline), "scheduler": scheduler_settings(pipeline)})
        self.pictures = self.cache / "pictures"

    def tuned(self, folders: Mapping[str, Path]) -> Files:
        """The concept files of every method, tuned where they are not there."""
        jobs: dict[Path, TuneJob] = {}
        files: dict[str, dict[str, Path]] = {}
        for method in self.suite.methods:
            files[method.key] = {}
            for concept in self.suite.concepts:
                path = concept.files.get(method.key) or concept.files.get(method.tuning)
                if path is None:
                    job = self._tuning(method, concept, folders[concept.name] / "train")
                    path, jobs[job.target] = job.target, job
                files[method.key][concept.name] = path
        self._do("tuning", [job for target, job in jobs.items() if not target.is_file()], len(jobs))
        self._check(files)
        return files

    def _tuning(self, method: MethodEntry, concept: ConceptEntry, data: Path) -> TuneJob:
        settings = self.suite.tuning(method, concept, data)
        masks = settings.masks or data.parent / "masks"
        key = digest(
            {
                "settings": with_presets(settings, settings.base).for_file(),
                "words": [settings.name, settings.class_word, settings.instance_prompt, settings.prior.prompt],
                "synonyms": settings.captions.synonyms,
                "data": folder_digest([data, masks, *filter(None, [settings.prior.data])]),
                "base": self.fingerprint,
            }
        )
        return TuneJob(settings, self.cache / "concepts" / f"{concept.name}-{key}.safetensors", self.device)

    def _check(self, files: Files) -> None:
        """Read all concept files once, so that a bad one is named before anything is fused."""
        pipeline = load_base(self.suite.base)
        for row in files.values():
            for name, path in row.items():
                if path in self.hashes:
                    continue
                concept = load_concept(path, pipeline)
                if concept.info.name != name:
                    raise SettingsError(f"{path}: expected the concept <{name}>, found <{concept.info.name}>")
                self.hashes[path] = concept.hash

    def plan(self, files: Files) -> Plan:
        """All pictures, once the models that draw them are known; fuses what is not fused."""
        fusing = {method.key: self._fusing(method, files[method.key]) for method in self.suite.methods}
        missing = {job.target: job for job in fusing.values() if not job.target.is_file()}
        self.fusions = {key: job.target for key, job in fusing.items()}
        self._do("fusing", list(missing.values()), len(set(self.fusions.values())))
        fused = {key: Model(self.suite.base, job.target.stem, job.files, job.target) for key, job in fusing.items()}
        single = {key: {name: self._single(path) for name, path in row.items()} for key, row in files.items()}
        words_only = {
            key: {name: self._single(path, strength=0.0) for name, path in files[key].items()}
            for key in self.suite.words_only
        }
        base = Model(self.suite.base, digest({"base": self.fingerprint}))
        return make_plan(self.suite, Models(base, single, words_only, fused), side=self.side)

    def _single(self, path: Path, strength: float = 1.0) -> Model:
        key = digest({"base": self.fingerprint, "concept": self.hashes[path], "strength": strength})
        return Model(self.suite.base, key, (path,), strength=strength)

    def _fusing(self, method: MethodEntry, row: Mapping[str, Path]) -> FuseJob:
        settings, files = self.suite.fusion(method), tuple(row.values())
        key = digest(
            {
                "base": self.fingerprint,
                "concepts": sorted(self.hashes[path] for path in files),
                "settings": settings.model_dump(mode="json"),
            }
        )
        return FuseJob(self.suite.base, files, settings, self.cache / "fused" / f"{key}.safetensors", self.device)

    def draw(self, plan: Plan) -> None:
        """Draw what is not drawn yet."""
        requests = plan.requests()
        missing = sorted(
            (one for one in requests if not one.is_drawn(self.pictures)), key=lambda one: one.model.identity
        )
        jobs: list[DrawJob] = []
        for model, group in groupby(missing, key=lambda one: one.model):
            row = tuple(group)
            jobs += [
                DrawJob(model, row[start : start + CHUNK], self.pictures, self.device)
                for start in range(0, len(row), CHUNK)
            ]
        self._do("drawing", jobs, len(requests), lambda job: len(job.requests) if isinstance(job, DrawJob) else 1)

    def _do(self, label: str, jobs: Sequence[Job], total: int, size: Callable[[Job], int] = lambda job: 1) -> None:
        """Do the jobs; those of `total` that are done already count."""
        done = total - sum(map(size, jobs))
        with self.bars(label) as progress:
            progress(done, total, {})
            for job in self.each(work, jobs):
                done += size(job)
                progress(done, total, {})

    def costs(self, files: Files) -> dict[str, Any]:
        """By method: mean seconds and most memory of tuning a concept, and those of fusing; none if not done here."""
        found: dict[str, Any] = {}
        for key, row in files.items():
            tuning = [cost for cost in map(read_cost, row.values()) if cost]
            found[key] = {"tune": _summed(tuning), "fuse": read_cost(self.fusions[key])}
        return found


def _summed(costs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None] | None:
    if not costs:
        return None
    memory = [cost["peak_memory_mb"] for cost in costs if cost["peak_memory_mb"] is not None]
    seconds = [cost["seconds"] or 0.0 for cost in costs]
    return {"seconds": round(sum(seconds) / len(seconds), 1), "peak_memory_mb": max(memory, default=None)}
