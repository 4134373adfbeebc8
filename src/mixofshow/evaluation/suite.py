"""The paper's whole evaluation as one YAML file, methods × concepts × {single, fused}.

A suite tunes, fuses and draws what is not there yet, looks at all of it, and writes a report.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby
from operator import methodcaller
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.bases.loading import fingerprint, scheduler_settings
from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.delta import load_delta
from mixofshow.concepts.manifest import Entry, make_manifest
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BadInputError, SettingsError, shown
from mixofshow.evaluation.report import write_suite_report
from mixofshow.evaluation.requests import BaseSource, DrawnBy, RequestPlan, digest, make_plan
from mixofshow.evaluation.results import Judge, SuiteRun, results_of, write_results
from mixofshow.evaluation.scorers import ImageTower, dino_scorer, imagenet_scorer, references_of, scorer_for
from mixofshow.evaluation.study import INDEX, write_index
from mixofshow.evaluation.suite_settings import ConceptEntry, MethodEntry, Suite, make_suite, read_suite, suite_of_files
from mixofshow.evaluation.tasks import DrawTask, Each, FuseTask, Task, TuneTask, folder_digest, process_pool, read_cost
from mixofshow.outputs import check_outputs, refusals
from mixofshow.progress import Progress, silent
from mixofshow.tuning.settings import with_presets

logger = logging.getLogger(__name__)

__all__ = ["Suite", "SuiteRun", "make_suite", "perform", "read_suite", "run_suite", "suite_of_files"]

CHUNK: Final = 12
"""Requests that a worker takes at once: they share the time to put their model together."""

Bars = Callable[[str], contextlib.AbstractContextManager[Progress]]
"""`bars("drawing")` is the progress of one part of the run."""
Files = Mapping[str, Mapping[str, Path]]
"""Concept files by method and concept."""


def no_bars(label: str) -> contextlib.AbstractContextManager[Progress]:
    """Progress that nobody watches."""
    return contextlib.nullcontext(silent)


def run_suite(suite: Suite, out: Path, **how: Any) -> dict[str, Any]:
    """Results of a suite, as `perform` makes them."""
    return perform(suite, out, **how).results


def perform(
    suite: Suite,
    out: Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    loading: Mapping[str, Any] | None = None,
    bars: Bars = no_bars,
) -> SuiteRun:
    """A suite's results; also in `out` as results.json, results.csv and report.html. `loading` are `load_base`'s options.

    What was tuned, fused and drawn is kept in `out`/cache, and taken from there by the next run. Raises BadInputError,
    ResourceError.
    """
    cache = out / "cache"
    _check_outputs(suite, out, cache)
    _check_files(suite)  # before anything is loaded
    with process_pool(workers) as each:
        base = BaseSource(suite.base, device, tuple(sorted({**suite.loading, **(loading or {})}.items())))
        run = _Run(suite, cache, base, each, bars)
        suite = run.suite
        scorer = scorer_for(suite.base, suite.clip, device=device)  # before anything that takes long
        towers = {"image_alignment": scorer.images, **_other_towers(suite, device)}
        folders = {part: _folders(suite, cache, part) for part in ("reference", "train")}
        references, training = (
            {name: references_of(folder) for name, folder in folders[part].items()} for part in folders
        )
        tell_of_shared(references, training)
        files = run.tuned(folders["train"])
        plan = run.plan(files)
        run.draw(plan)

    with bars("measuring"):
        judges = {
            measure: Judge(
                tower,
                scorer.texts,
                run.pictures,
                {name: tower(images) for name, images in references.items()},
                {name: tower(images) for name, images in training.items()},
            )
            for measure, tower in towers.items()
        }
        results = results_of(suite, plan, judges)
    results |= {"made_for": run.made_for, "cost": run.costs(files), "machine": _machine(workers, device)}
    write_results(results, out)
    write_index(plan, run.pictures, folders["reference"], out)
    made = SuiteRun(suite, results, plan, run.pictures, references)
    write_suite_report(out / "report.html", made)
    return made


def _other_towers(suite: Suite, device: str) -> dict[str, ImageTower]:
    towers = {"dino_alignment": dino_scorer(suite.dino, device=device)} if suite.dino else {}
    wanted = bool(find_spec("efficientnet_lite_pytorch")) if suite.imagenet is None else suite.imagenet
    return towers | ({"imagenet_alignment": imagenet_scorer(device=device)} if wanted else {})


def _check_outputs(suite: Suite, out: Path, cache: Path) -> None:
    names = {"JSON": ("results.json", INDEX), "CSV": ("results.csv",), "HTML": ("report.html",)}
    files = {kind: [out / name for name in some] for kind, some in names.items()}
    check_outputs(files=files, shared=[cache], inputs=suite.inputs)
    if there := [] if cache.is_dir() else [path for some in files.values() for path in some if path.exists()]:
        raise BadInputError(
            f"{shown(there[0], 100)}: is there and of no suite, for there is no cache; choose another folder"
        )


def _folders(suite: Suite, cache: Path, part: str) -> dict[str, Path]:
    """By concept, where its "reference" or "train" pictures are; Emojiland's own are drawn."""
    found = {}
    for one in suite.concepts:
        if one.references and part == "reference":
            found[one.name] = one.references
        elif one.folder:
            found[one.name] = one.folder / part
        elif not one.references:
            folder = cache / "emojiland" / one.name
            with refusals(folder):
                write_concept(one.name, folder)
            found[one.name] = folder / part
    return found


def tell_of_shared(references: Mapping[str, list[Image.Image]], training: Mapping[str, list[Image.Image]]) -> None:
    """Warn of held-out pictures that are not held out, or are of two concepts: they make a concept seem well learned."""
    held, taught = ({name: set(map(_pixels, images)) for name, images in one.items()} for one in (references, training))
    for name, own in held.items():
        places = {f"the pictures that <{one}> is tuned on": pixels for one, pixels in taught.items()}
        places |= {f"those of <{one}>": pixels for one, pixels in held.items() if one != name}
        for place, pixels in places.items():
            if shared := len(own & pixels):
                logger.warning("<%s>: %d of %d held-out pictures are among %s", name, shared, len(own), place)


def _pixels(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _check_files(suite: Suite) -> None:
    for concept in suite.concepts:
        for path in concept.files.values():
            _require_name(load_concept(path), concept.name, path)


def _require_name(concept: Concept, name: str, path: Path) -> None:
    if concept.info.name != name:
        raise SettingsError(f"{path}: expected the concept <{name}>, found <{concept.info.name}>")


def _machine(workers: int, device: str) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "workers": workers,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@dataclass
class _Run:
    """A run under way: what it is of, and where things are kept. `fingerprint` is of all of the base that draws.

    `made_for` has, by method, the concepts taken from a sister of the base, and what they were made for.
    """

    suite: Suite
    cache: Path
    base: BaseSource
    each: Each
    bars: Bars
    hashes: dict[Path, str] = field(default_factory=dict)
    fusions: dict[str, Path] = field(default_factory=dict)
    made_for: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pipeline = self.base.load()
        if self.suite.guidance_scale is None:  # said in so many words, pictures and results tell of it
            usual = ConceptModel(pipeline).usual_guidance
            self.suite = self.suite.model_copy(update={"guidance_scale": usual})
        self.side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        how = {"loading": self.base.options} if self.base.options else {}
        weights = fingerprint(pipeline)
        self.fingerprint = digest({"weights": weights, "scheduler": scheduler_settings(pipeline), **how})
        self.pictures = self.cache / "pictures"

    def tuned(self, folders: Mapping[str, Path]) -> Files:
        """The concept files of every method, tuned where they are not there; `folders` have the training pictures."""
        tasks: dict[Path, TuneTask] = {}

        def file(method: MethodEntry, concept: ConceptEntry) -> Path:
            if path := concept.files.get(method.key) or concept.files.get(method.tuning):
                return path
            task = self._tuning(method, concept, folders)
            return tasks.setdefault(task.target, task).target

        files = {
            method.key: {concept.name: file(method, concept) for concept in self.suite.concepts}
            for method in self.suite.methods
        }
        self._make("tuning", tasks)
        self._check(files)
        return files

    def _tuning(self, method: MethodEntry, concept: ConceptEntry, folders: Mapping[str, Path]) -> TuneTask:
        if concept.name not in folders:
            raise SettingsError(f"concept {concept.name}: needs a folder of pictures, or a file for {method.key}")
        settings = self.suite.tuning(method, concept, folders[concept.name])
        masks = settings.masks or settings.data.parent / "masks"
        key = digest(
            {
                "settings": with_presets(settings, settings.base).for_file(),
                "words": [settings.name, settings.class_word, settings.instance_prompt, settings.prior.prompt],
                "synonyms": settings.captions.synonyms,
                "data": folder_digest([settings.data, masks, *filter(None, [settings.prior.data])]),
                "base": self.fingerprint,
            }
        )
        return TuneTask(self.base, settings, self.cache / "concepts" / f"{concept.name}-{key}.safetensors")

    def _check(self, files: Files) -> None:
        """Read all files once, so that a bad one is named before anything is fused or drawn."""
        pipeline, entries = self.base.load(), dict[Path, Entry]()
        for name, path in ((name, path) for row in files.values() for name, path in row.items()):
            if path not in entries:
                concept = load_concept(path, pipeline)
                _require_name(concept, name, path)
                entries[path] = Entry.of(concept)
        self.hashes = {path: entry.hash for path, entry in entries.items()}
        for method in self.suite.methods:
            used = [entries[path] for path in files[method.key].values()]
            if method.fused:
                delta = load_delta(method.fused)
                delta.check_fits(pipeline, str(method.fused))
                known = {*delta.info.words, *delta.info.aliases}
                if missing := [one.noun for one in self.suite.concepts if one.noun not in known]:
                    raise SettingsError(f"{method.fused}: expected a model of all concepts, it knows no {missing[0]}")
                used += make_manifest(delta.info.manifest, str(method.fused)).concepts
            if taken := {one.name: one.made_for for one in used if one.made_for}:
                self.made_for[method.key] = taken

    def plan(self, files: Files) -> RequestPlan:
        """All pictures, once the models that draw them are known; fuses what is not fused."""
        fusing = {one.key: self._fusing(one, files[one.key]) for one in self.suite.methods if not one.fused}
        self.fusions = {key: task.target for key, task in fusing.items()}
        self._make("fusing", {task.target: task for task in fusing.values()})
        return make_plan(
            self.suite,
            DrawnBy(self.base, digest({"base": self.fingerprint})),
            single={key: {name: self._single(path) for name, path in row.items()} for key, row in files.items()},
            words_only={
                key: {name: self._single(path, strength=0.0) for name, path in files[key].items()}
                for key in self.suite.words_only
            },
            fused={one.key: self._fused(one) for one in self.suite.methods},
            side=self.side,
        )

    def _single(self, path: Path, strength: float = 1.0) -> DrawnBy:
        key = digest({"base": self.fingerprint, "concept": self.hashes[path], "strength": strength})
        return DrawnBy(self.base, key, path, strength)

    def _fused(self, method: MethodEntry) -> DrawnBy:
        if not method.fused:
            return DrawnBy(self.base, self.fusions[method.key].stem, delta=self.fusions[method.key])
        content = hashlib.sha256(method.fused.read_bytes()).hexdigest()
        return DrawnBy(self.base, digest({"base": self.fingerprint, "delta": content}), delta=method.fused)

    def _fusing(self, method: MethodEntry, row: Mapping[str, Path]) -> FuseTask:
        settings, files = self.suite.fusion(method), tuple(row.values())
        key = digest(
            {
                "base": self.fingerprint,
                "concepts": sorted(self.hashes[path] for path in files),
                "settings": settings.model_dump(mode="json"),
            }
        )
        return FuseTask(self.base, files, settings, self.cache / "fused" / f"{key}.safetensors")

    def draw(self, plan: RequestPlan) -> None:
        """Draw what is not drawn yet."""
        requests = plan.requests()
        missing = [one for one in requests if not all(path.is_file() for path in one.paths(self.pictures))]
        tasks: list[DrawTask] = []
        for model, group in groupby(sorted(missing, key=lambda one: one.model.identity), key=lambda one: one.model):
            row = tuple(group)
            tasks += [DrawTask(model, row[k : k + CHUNK], self.pictures) for k in range(0, len(row), CHUNK)]
        self._do("drawing", tasks, len(requests), lambda task: len(task.requests))

    def _make(self, label: str, tasks: Mapping[Path, TuneTask] | Mapping[Path, FuseTask]) -> None:
        """Make the files that are not there yet."""
        missing = [task for target, task in tasks.items() if not target.is_file()]
        self._do(label, missing, len(tasks), lambda task: 1)

    def _do(self, label: str, tasks: Sequence[Task], total: int, size: Callable[[Any], int]) -> None:
        """Do the tasks; those of `total` that are done already count."""
        done = total - sum(map(size, tasks))
        with self.bars(label) if total else no_bars(label) as progress:
            progress(done, total, {})
            for task in self.each(methodcaller("work"), tasks):
                done += size(task)
                progress(done, total, {})

    def costs(self, files: Files) -> dict[str, Any]:
        """By method: mean seconds and most memory of tuning a concept, and those of fusing; none if not done here."""
        return {
            key: {
                "tune": _summed([cost for cost in map(read_cost, row.values()) if cost]),
                "fuse": read_cost(self.fusions[key]) if key in self.fusions else None,
            }
            for key, row in files.items()
        }


def _summed(costs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None] | None:
    if not costs:
        return None
    memory = [cost["peak_memory_mb"] for cost in costs if cost["peak_memory_mb"] is not None]
    seconds = [cost["seconds"] or 0.0 for cost in costs]
    return {"seconds": round(sum(seconds) / len(seconds), 1), "peak_memory_mb": max(memory, default=None)}
