"""Fusion from concepts to a model: record stage by stage, solve layer by layer, and again in the fused model if asked to.

Concepts are taken in the order of their hashes, so that the order of the files does not matter.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.bases.families import family_of, refuse_inpainting, text_encoders
from mixofshow.bases.layers import layer, lora_layers, matrix, tunable_layers, where_double
from mixofshow.bases.loading import fingerprint, scheduler_settings
from mixofshow.bases.parts import exclusive, refuse_adapters, refuse_hooks
from mixofshow.concepts.adapters import replaced
from mixofshow.concepts.concept import Concept, fitted, vocabulary
from mixofshow.concepts.interchange.importing import as_concept
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BadInputError, SettingsError, listed
from mixofshow.fusion.guard import Verdict, as_judged, verdicts
from mixofshow.fusion.methods import KEEPS_INPUTS
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.recording import STAGES, Source, Stage, record, stage_of
from mixofshow.fusion.refitting import refit
from mixofshow.fusion.settings import FusionSettings, RecordingSettings, asked
from mixofshow.fusion.solving import (
    LayerReport,
    beside,
    check_method,
    check_weights,
    looks_at_inputs,
    problem_of,
    report_of,
    solve,
    solver_for,
)
from mixofshow.fusion.statistics import LayerStatistics, input_of, parts
from mixofshow.fusion.store import ROOM, Found_co, Keeper, Recorded, Recording, Scratch, StatisticsReader, Store
from mixofshow.outputs import scratch
from mixofshow.progress import Progress, silent

MOMENTS: Final = 3.0
"""Gigabytes for what is recorded at a time on an accelerator, where nobody said how much."""
INDEPENDENT: Final = {"mode": "independent"}
"""How a source's whole own model is recorded: nothing of it depends on other concepts."""
NOT_IN_RECORDINGS: Final = ("refine", "refit", "guard", "refuse_loud", "measure", "leave_one_out", "max_memory")
"""Settings that change no recording: they come after it, or say who takes part, which concepts' hashes tell."""


@dataclass(frozen=True)
class Fused:
    """The fused model and how well each layer was fused; `refitted` is each concept's loss, before and after.

    `verdicts` are the concepts, by name, that did not take part as they are. Where nothing was recorded, reports have no rows
    and are about the changes themselves.
    """

    model: ConceptModel
    layers: dict[str, LayerReport]
    refitted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)

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
    check_weights(settings, [concept.info.name for concept in ordered])
    refuse_adapters(pipeline, "fusing")
    refuse_hooks(pipeline, "fusing")
    if looks_at_inputs(settings) or settings.refit:
        refuse_inpainting(pipeline, "fusing, but by a method that looks at no inputs,")
    if settings.refit and pipeline.unet.dtype == torch.float16:
        # Its gradients are below what half precision can hold: nothing would be learned, and nobody told.
        raise SettingsError("refit: does not work in fp16; load the base in bf16 or fp32, or take refit 0")
    base = fingerprint(pipeline)
    ordered = [fitted(concept, pipeline, f"concept <{concept.info.name}>", base=base) for concept in ordered]
    with exclusive(pipeline), _kept(store, settings) as recordings:
        told = _verdicts(pipeline, ordered, settings)
        fusion = _Fusion(pipeline, base, as_judged(ordered, told), told, settings, recordings, progress)
        fusion.run()
        pupils = [one for k, one in enumerate(fusion.concepts) if k not in told or not told[k].excluded]
        found = refit(pipeline, pupils, fusion.weights, settings, progress=progress)
    words = vocabulary({one.info.name: one for one in [*ordered, *found.concepts]}.values())
    how = settings.model_dump(mode="json")
    model = ConceptModel(pipeline, words, found.weights, ordered, how, torch.get_num_threads())
    return Fused(model, fusion.reports, found.losses, {ordered[k].info.name: verdict for k, verdict in told.items()})


@contextlib.contextmanager
def _kept(store: Store | None, settings: FusionSettings) -> Iterator[Keeper[Any]]:
    """Where recordings go: the store, or in memory and a folder that vanishes at the end."""
    if store is not None:
        yield store
        return
    with scratch() as folder:
        yield Scratch(folder, 0 if settings.max_memory else ROOM)


def _verdicts(pipeline: Any, concepts: Sequence[Concept], settings: FusionSettings) -> dict[int, Verdict]:
    """The guard's, on all concepts. Raises BadInputError for outliers, if they are refused."""
    changed = {name for concept in concepts for name in concept.deltas}
    bases = {name: where_double(matrix(one)) for name, one in tunable_layers(pipeline).items() if name in changed}
    found = verdicts(bases, concepts, guard=settings.guard or settings.refuse_loud)
    refused = [
        f"<{concepts[k].info.name}> in {len(one.strengths)} of {len(bases)} layers ({one.why})"
        for k, one in found.items()
        if one.downweighted
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
    refuse_hooks(pipeline, "recording")
    refuse_inpainting(pipeline, "recording")
    names = _with_attention(pipeline, concept.deltas)
    source = Source.of(concept, settings)
    return _recorded(pipeline, source, names, settings, store, base=fingerprint(pipeline), how=INDEPENDENT)


def _with_attention(pipeline: Any, changed: Collection[str]) -> list[str]:
    """The changed layers and all attention, in forward order."""
    attention = lora_layers(pipeline)
    return [name for name in tunable_layers(pipeline) if name in changed or name in attention]


def _recorded(
    pipeline: Any,
    source: Source,
    names: Sequence[str],
    settings: RecordingSettings,
    store: Keeper[Found_co],
    *,
    base: str,
    how: Mapping[str, Any],
    keep_inputs: bool = False,
    exact: bool = True,
    own: Collection[str] | None = None,
) -> Found_co:
    """What a source's layers see, from the store, or recorded into it.

    `base` is the fingerprint of the pipeline with its own weights, and `how` is what a recording depends on beside it.
    The rest are options of `record`.
    """
    key = {
        "source": source.concept.hash if source.concept else "base",
        "base": base,
        "precision": str(pipeline.unet.dtype),
        "scheduler": scheduler_settings(pipeline),
        **({"clip_skip": skips} if any(skips := [one.clip_skip for one in text_encoders(pipeline)]) else {}),
        "texts": source.texts,
        "pictures": source.pictures,
        "settings": settings.recording(),
        "inputs": keep_inputs,
        **({} if exact else {"products": "single"}),
        **how,
    }
    name = source.name.replace(" ", "-")
    found = store.find(key, name, {input_of(layer_name) for layer_name in names})
    if found is not None:
        return found
    seen = record(pipeline, source, names, settings, own=own, keep_inputs=keep_inputs, exact=exact)
    return store.save(key, name, seen)


@dataclass
class _Fusion:
    """A fusion under way: the weights and reports of the layers that are done.

    The concepts are at the size that the `verdicts`, by position, leave them.
    """

    pipeline: Any
    base: str
    concepts: Sequence[Concept]
    verdicts: Mapping[int, Verdict]
    settings: FusionSettings
    store: Keeper[Any]
    progress: Progress
    weights: dict[str, Tensor] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(default_factory=dict)
    recorded: int = 0

    def run(self) -> None:
        """All layers, then the passes of refinement; at once where nothing need be recorded, or nobody is left."""
        names = self._names(STAGES)
        if not looks_at_inputs(self.settings):
            self._solve(names)
        elif names and self.settings.mode == "independent":
            self._solve(names, self._record(_with_attention(self.pipeline, names), INDEPENDENT))
        else:
            for stage in STAGES:
                own = self._names([stage])
                # The text encoder comes first: nothing before it is fused, whoever the other concepts are.
                behind = None if stage == "text" else [stage, self.identity]
                self._in_parts(own, {"mode": "staged", "behind": behind}, own=set(own))
        for number in range(self._passes):
            self._in_parts(names, {"mode": "refined", "behind": [number, self.identity]}, own=set())

    @property
    def _passes(self) -> int:
        """One concept alone is kept as it is."""
        return self.settings.refine if len(self.counted) > 1 and looks_at_inputs(self.settings) else 0

    @cached_property
    def counted(self) -> list[Concept]:
        """Those that have a say."""
        return [self.concepts[number] for number in self._places[:-1]]

    @cached_property
    def _places(self) -> list[int]:
        """The positions of those that have a say, and of the base, which comes last."""
        uncounted = {number for number, verdict in self.verdicts.items() if not verdict.counted}
        return [number for number in range(len(self.concepts) + 1) if number not in uncounted]

    def _in_parts(self, names: Sequence[str], how: Mapping[str, Any], *, own: set[str]) -> None:
        """Record and solve layers: at once, or so many at a time that their moments fit into the memory allowed.

        While recording, layers in `own` have the concept's weights, and all others those that are fused so far.
        """
        fused = dict(self.weights)
        widths = {name: matrix(layer(self.pipeline, name)).shape[1] for name in names}
        moments = self.settings.max_memory or (None if self.pipeline.unet.device.type == "cpu" else MOMENTS)
        allowed = moments and moments * 2**30
        groups = parts(names, widths, allowed)
        for group in groups:
            of_group = how if len(groups) == 1 else {**how, "behind": [how["behind"], group]}
            with replaced(self.pipeline, fused, parked=True):
                recordings = self._record(group, of_group, counts=group is groups[-1], own=own)
            self._solve(group, recordings)

    @cached_property
    def identity(self) -> list[Any]:
        """What recordings depend on where earlier layers are fused: who has a say, and how it is solved."""
        settings = self.settings.model_dump(mode="json", exclude=set(NOT_IN_RECORDINGS))
        return [[concept.hash for concept in self.counted], settings]

    def _names(self, stages: Sequence[Stage]) -> list[str]:
        """The changed layers of some stages, in forward order."""
        changed = {name for concept in self.counted for name in concept.deltas}
        return [name for name in tunable_layers(self.pipeline) if name in changed and stage_of(name) in stages]

    def _record(
        self, names: Sequence[str], how: Mapping[str, Any], *, counts: bool = True, **options: Any
    ) -> list[Recorded]:
        """Of the concepts, and last of the base if its own prompts count."""
        settings = self.settings
        recordings: list[Recorded] = []
        of_base = [Source.of_base(settings)] if settings.prior else []
        sources = [*(Source.of(concept, settings) for concept in self.concepts), *of_base]
        rounds = (1 if settings.mode == "independent" else len(STAGES)) + self._passes
        options |= {
            "base": self.base,
            "how": how,
            "keep_inputs": settings.method in KEEPS_INPUTS,
            "exact": settings.exact,
        }
        for source in sources:
            recordings.append(_recorded(self.pipeline, source, names, settings, self.store, **options))
            self.recorded += counts
            self.progress(self.recorded, rounds * len(sources), {})
        return recordings

    def _solve(self, names: Sequence[str], recordings: Sequence[Recorded] = ()) -> None:
        """One layer after another, those with one input together.

        Without recordings changes are measured as they are, as if all inputs came equally often.
        """
        for source, readers in itertools.groupby(names, input_of):
            layers = list(readers)
            base = where_double(matrix(layer(self.pipeline, layers[0])))
            width, device = base.shape[1], base.device
            statistics: Callable[[int], LayerStatistics] = StatisticsReader(recordings, source, device, width)
            if not recordings:
                any_input = LayerStatistics(torch.eye(width, dtype=torch.float64, device=device), rows=0)
                statistics = ([any_input] * (len(self.concepts) + 1)).__getitem__
            for name in layers:
                self._solve_layer(name, statistics)

    def _solve_layer(self, name: str, statistics: Callable[[int], LayerStatistics]) -> None:
        """The layer's weight, solved for those that have a say, and its report on all."""
        own = matrix(layer(self.pipeline, name))
        base, solver = where_double(own), solver_for(self.settings, stage_of(name))
        problem = problem_of(name, base, self.counted, lambda k: statistics(self._places[k]), self.settings)
        fused, change = solve(problem, solver)
        self.weights[name] = fused.to(own.device)
        changes = [concept.deltas.get(name) for concept in self.concepts]
        asked = LayerProblem(base, changes, statistics, [1.0] * len(changes))
        called = [concept.info.name for concept in self.concepts]
        report = report_of(asked, problem, change, called)
        if self.settings.leave_one_out:
            report = beside(report, problem, change, [concept.info.name for concept in self.counted], solver)
        clipped = {called[k]: one.strengths[name] for k, one in self.verdicts.items() if name in one.strengths}
        self.reports[name] = replace(report, clipped=clipped)
