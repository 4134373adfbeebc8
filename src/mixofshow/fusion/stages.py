"""Fusion from concepts to a model: record stage by stage, solve layer by layer, correct for drift if asked to.

Concepts are taken in the order of their hashes, so that the order of the files does not matter.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.bases.families import family_of, text_encoders
from mixofshow.bases.layers import layer, lora_layers, matrix, tunable_layers
from mixofshow.bases.loading import fingerprint, scheduler_settings
from mixofshow.bases.parts import exclusive, refuse_adapters
from mixofshow.concepts.adapters import replaced
from mixofshow.concepts.concept import Concept, fitted, vocabulary
from mixofshow.concepts.interchange.importing import as_concept
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BadInputError, SettingsError, listed
from mixofshow.fusion.guard import Voice, heard, voices
from mixofshow.fusion.methods import KEEPS_INPUTS
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.recording import STAGES, Source, Stage, record, stage_of
from mixofshow.fusion.refitting import refit
from mixofshow.fusion.settings import FusionSettings, RecordingSettings, asked
from mixofshow.fusion.solving import (
    LayerReport,
    beside,
    check_method,
    looks_at_inputs,
    problem_of,
    report_of,
    solve,
    solver_for,
)
from mixofshow.fusion.statistics import Seen, input_of, parts
from mixofshow.fusion.store import Looks, Recording, Store
from mixofshow.outputs import scratch
from mixofshow.progress import Progress, silent

NOT_IN_RECORDINGS: Final = ("refine", "refit", "guard", "refuse_loud", "measure", "leave_one_out", "max_memory")
"""Settings that change no recording: they come after it, or say who is heard, which concepts' hashes tell."""


@dataclass(frozen=True)
class Fused:
    """The fused model and how well each layer was fused; `refitted` is each concept's loss, before and after.

    `voices` are the concepts, by name, that were not heard as they are. Where nothing was recorded, reports have no rows
    and are about the changes themselves.
    """

    model: ConceptModel
    layers: dict[str, LayerReport]
    refitted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    voices: Mapping[str, Voice] = field(default_factory=dict)

    @property
    def recorded(self) -> bool:
        """Whether residuals are about what layers saw."""
        return any(one.rows for one in self.layers.values())


@torch.no_grad()
def fuse(
    concepts: Concept | str | Path | Iterable[Concept | str | Path],
    pipeline: Any,
    settings: FusionSettings | None = None,
    *,
    store: Store | None = None,
    progress: Progress = silent,
    **keys: Any,
) -> Fused:
    """Fuse concepts, or their files, into one model: `fuse([…], pipeline, method="average")`.

    Settings are keys of the call, or were made before. The pipeline is left as it was. Raises TokenError when two claim
    one word, ConceptFileError for one of another base, BaseModelError for a base with adapters (LoRAs) attached,
    SettingsError for refitting in fp16.

    Recordings go to and are taken from the `store`; without one they are forgotten afterwards. A fusion that was
    broken off goes on from those that are there. Progress is counted in recordings, then anew in steps of refitting.
    """
    settings = asked(settings, keys)
    family_of(pipeline)  # so that what is no base model is told as that
    several: Any = concepts if isinstance(concepts, Iterable) and not isinstance(concepts, str) else [concepts]
    given = [as_concept(one, pipeline) for one in several]
    if not given:
        raise BadInputError("nothing to fuse: no concept was given")
    ordered = sorted(given, key=lambda concept: concept.hash)
    vocabulary(ordered)  # so that two that claim one word are named before anything is recorded
    check_method(settings)
    _check_names(ordered, settings)
    refuse_adapters(pipeline, "fusing")
    if settings.refit and pipeline.unet.dtype == torch.float16:
        # Its gradients are below what half precision can hold, so that it would teach nothing and say so nowhere.
        raise SettingsError("refit: does not work in fp16; load the base in bf16 or fp32, or take refit 0")
    base = fingerprint(pipeline)
    ordered = [fitted(concept, pipeline, f"concept <{concept.info.name}>", base=base) for concept in ordered]
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(pipeline))
        if store is None:
            store = Store(stack.enter_context(scratch()))
        told = _voices(pipeline, ordered, settings)
        recorder = _Recorder(pipeline, settings, store, settings.method in KEEPS_INPUTS)
        fusion = _Fusion(pipeline, heard(ordered, told), told, settings, recorder, progress)
        fusion.run()
        pupils = [one for k, one in enumerate(fusion.concepts) if k not in told or not told[k].left_out]
        found = refit(pipeline, pupils, fusion.weights, settings, progress=progress)
    words = vocabulary({one.info.name: one for one in [*ordered, *found.concepts]}.values())
    how = settings.model_dump(mode="json")
    model = ConceptModel(pipeline, words, found.weights, ordered, how, torch.get_num_threads())
    return Fused(model, fusion.reports, found.losses, {ordered[k].info.name: voice for k, voice in told.items()})


def _voices(pipeline: Any, concepts: Sequence[Concept], settings: FusionSettings) -> dict[int, Voice]:
    """How concepts are heard that are not heard as they are. Raises BadInputError for loud ones, if they are refused."""
    changed = {name for concept in concepts for name in concept.deltas}
    bases = {name: matrix(one) for name, one in tunable_layers(pipeline).items() if name in changed}
    found = voices(bases, concepts, guard=settings.guard or settings.refuse_loud)
    refused = [
        f"<{concepts[k].info.name}> in {len(one.strengths)} of {len(bases)} layers ({one.why})"
        for k, one in found.items()
        if one.turned_down
    ]
    if settings.refuse_loud and refused:
        raise BadInputError(
            f"concepts that are far louder than the others: {listed(refused)}; leave them out, or let the guard do it"
        )
    return found


def record_concept(concept: Concept, pipeline: Any, settings: RecordingSettings, store: Store) -> Recording:
    """Record a concept's whole own model for independent fusions, or find it recorded in the store.

    Recorded are the layers that it changes, and all attention: what other concepts are likely to change.
    """
    recorder = _Recorder(pipeline, settings, store)
    return recorder.independent(Source.of(concept, settings), recorder.usual(concept.deltas))


def _check_names(concepts: Sequence[Concept], settings: FusionSettings) -> None:
    if isinstance(settings.weights, Mapping):
        unknown = settings.weights.keys() - {concept.info.name for concept in concepts}
        if unknown:
            raise BadInputError(f"weights: no concept is called {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class _Recorder:
    """Records what is not yet in the store."""

    pipeline: Any
    settings: RecordingSettings
    store: Store
    keep_inputs: bool = False

    def usual(self, changed: Collection[str]) -> list[str]:
        """The changed layers and all attention, in forward order."""
        attention = lora_layers(self.pipeline)
        return [name for name in tunable_layers(self.pipeline) if name in changed or name in attention]

    def independent(self, source: Source, names: Sequence[str]) -> Recording:
        """The source's whole own model: nothing of it depends on other concepts."""
        return self._recorded(source, names, {"mode": "independent"})

    def staged(self, source: Source, names: Sequence[str], behind: Any, own: Collection[str]) -> Recording:
        """Only the `own` layers are its own; `behind` tells what the pipeline has in the others."""
        return self._recorded(source, names, {"mode": "staged", "behind": behind}, own=own)

    def drifted(self, source: Source, names: Sequence[str], behind: Any, fused: Mapping[str, Tensor]) -> Recording:
        """The source's whole own model beside the fused one; `behind` tells how that came about."""
        return self._recorded(source, names, {"mode": "drifted", "behind": behind}, fused=fused)

    def _recorded(self, source: Source, names: Sequence[str], how: Mapping[str, Any], **options: Any) -> Recording:
        key = {
            "source": source.concept.hash if source.concept else "base",
            "base": self.fingerprint,
            "precision": str(self.pipeline.unet.dtype),
            "scheduler": scheduler_settings(self.pipeline),
            **({"clip_skip": skips} if any(skips := [one.clip_skip for one in text_encoders(self.pipeline)]) else {}),
            "texts": source.texts,
            "pictures": source.pictures,
            "settings": self.settings.recording(),
            "inputs": self.keep_inputs,
            **how,
        }
        name = source.name.replace(" ", "-")
        found = self.store.find(key, name, {input_of(layer_name) for layer_name in names})
        if found is not None:
            return found
        seen = record(self.pipeline, source, names, self.settings, keep_inputs=self.keep_inputs, **options)
        return self.store.keep(key, name, seen)

    @cached_property
    def fingerprint(self) -> str:
        """The base model's; taken while the pipeline has its own weights."""
        return fingerprint(self.pipeline)


@dataclass
class _Fusion:
    """A fusion under way: the weights and reports of the layers that are done.

    The concepts are as loud as they are heard; `voices` tells, by position, who is not heard as it is.
    """

    pipeline: Any
    concepts: Sequence[Concept]
    voices: Mapping[int, Voice]
    settings: FusionSettings
    recorder: _Recorder
    progress: Progress
    weights: dict[str, Tensor] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(default_factory=dict)
    recorded: int = 0

    def run(self) -> None:
        """All layers, then the passes of refinement; at once where nothing need be recorded, or nobody is left."""
        if not self._changed:
            return
        if not looks_at_inputs(self.settings):
            self._solve_blindly(self._names(STAGES))
        elif self.settings.mode == "independent":
            names = [name for name in self.recorder.usual(self._changed) if name in self._changed]
            self._solve(names, self._record(partial(self.recorder.independent, names=self.recorder.usual(names))))
        else:
            for stage in STAGES:
                names = self._names([stage])
                # The text encoder comes first: nothing is fused behind it, whoever the other concepts are.
                behind = None if stage == "text" else [stage, self.identity]
                with replaced(self.pipeline, self.weights):
                    self._in_parts(names, partial(self.recorder.staged, own=set(names)), behind, moments=1)
        for number in range(self._passes):
            self._refine(number)

    @property
    def _passes(self) -> int:
        """One concept alone is kept as it is: nothing drifts."""
        return self.settings.passes if len(self.counted) > 1 and looks_at_inputs(self.settings) else 0

    @cached_property
    def counted(self) -> list[Concept]:
        """Those that have a say."""
        return [self.concepts[number] for number in self._places[:-1]]

    @cached_property
    def _places(self) -> list[int]:
        """The positions of those that have a say, and of the base, which stands behind all concepts."""
        uncounted = {number for number, voice in self.voices.items() if not voice.counted}
        return [number for number in range(len(self.concepts) + 1) if number not in uncounted]

    def _refine(self, number: int) -> None:
        """Solve all layers again, for the inputs that they have in the fused model."""
        for stages in [[stage] for stage in STAGES] if self.settings.refine_order == "stages" else [STAGES]:
            drifted = partial(self.recorder.drifted, fused=dict(self.weights))
            self._in_parts(self._names(stages), drifted, [number, stages, self.identity], moments=3)

    def _in_parts(
        self, names: Sequence[str], record_one: Callable[..., Recording], behind: Any, *, moments: int
    ) -> None:
        """Record and solve layers: at once, or so many at a time that their moments fit into the memory allowed."""
        widths = {name: matrix(layer(self.pipeline, name)).shape[1] for name in names}
        allowed = self.settings.max_memory and self.settings.max_memory * 2**30 / moments
        groups = parts(names, widths, allowed)
        for group in groups:
            told = behind if len(groups) == 1 else [behind, group]
            self._solve(group, self._record(partial(record_one, names=group, behind=told), counts=group is groups[-1]))

    @cached_property
    def identity(self) -> list[Any]:
        """What all recordings behind fused layers depend on: who has a say, and how it is solved."""
        settings = self.settings.model_dump(mode="json", exclude=set(NOT_IN_RECORDINGS))
        return [[concept.hash for concept in self.counted], settings]

    @cached_property
    def _changed(self) -> set[str]:
        return {name for concept in self.counted for name in concept.deltas}

    def _names(self, stages: Sequence[Stage]) -> list[str]:
        """The changed layers of some stages, in forward order."""
        layers = tunable_layers(self.pipeline)
        return [name for name in layers if name in self._changed and stage_of(name) in stages]

    @property
    def _sources(self) -> list[Source]:
        """The concepts, and behind them the base if its own prompts count."""
        settings = self.settings
        of_base = [Source.of_base(settings)] if settings.prior else []
        return [*(Source.of(concept, settings) for concept in self.concepts), *of_base]

    def _record(self, record_one: Callable[[Source], Recording], *, counts: bool = True) -> list[Recording]:
        recordings = []
        rounds = (1 if self.settings.mode == "independent" else len(STAGES)) + self._passes * (
            1 if self.settings.refine_order == "all" else len(STAGES)
        )
        for source in self._sources:
            recordings.append(record_one(source))
            self.recorded += counts
            self.progress(self.recorded, rounds * len(self._sources), {})
        return recordings

    def _solve(self, names: Sequence[str], recordings: Sequence[Recording]) -> None:
        """One layer after another, those with one input together."""
        device = self.pipeline.device  # looked up once: diffusers goes through all modules for it
        for source, readers in itertools.groupby(names, input_of):
            layers = list(readers)
            look = Looks(recordings, source, device, matrix(layer(self.pipeline, layers[0])).shape[1])
            for name in layers:
                self._solve_layer(name, look)

    def _solve_blindly(self, names: Sequence[str]) -> None:
        """The same from the changes alone; they are measured as they are, as if all inputs came equally often."""
        for name in names:
            width = matrix(layer(self.pipeline, name)).shape[1]
            any_input = Seen(torch.eye(width, dtype=torch.float64, device=self.pipeline.device), rows=0)
            self._solve_layer(name, ([any_input] * (len(self.concepts) + 1)).__getitem__)

    def _solve_layer(self, name: str, look: Callable[[int], Seen]) -> None:
        """The layer's weight by those that have a say, and what it leaves undone of what all ask for."""
        base, solver = matrix(layer(self.pipeline, name)), solver_for(self.settings, stage_of(name))
        problem = problem_of(name, base, self.counted, lambda k: look(self._places[k]), self.settings)
        self.weights[name], change = solve(problem, solver)
        changes = [concept.deltas.get(name) for concept in self.concepts]
        asked = LayerProblem(base, changes, look, [1.0] * len(changes))
        called = [concept.info.name for concept in self.concepts]
        report = report_of(asked, problem, change, called)
        if self.settings.leave_one_out:
            report = beside(report, problem, change, [concept.info.name for concept in self.counted], solver)
        clipped = {called[k]: one.strengths[name] for k, one in self.voices.items() if name in one.strengths}
        self.reports[name] = replace(report, clipped=clipped)
