"""The client's training loop: pictures of one concept to a Concept, by any method."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs

from mixofshow.bases.families import clip_skip_said, family_of, refuse_inpainting, text_encoders
from mixofshow.bases.loading import DTYPES, base_name, fingerprint
from mixofshow.bases.memory import recomputing
from mixofshow.bases.parts import exclusive, refuse_adapters, refuse_hooks
from mixofshow.concepts.concept import CLIP_SKIP, LARGEST_EMBEDDING, Concept, ConceptInfo
from mixofshow.concepts.prompts import layerwise
from mixofshow.errors import SettingsError
from mixofshow.outputs import check_outputs
from mixofshow.progress import Progress, silent
from mixofshow.tuning.adapters import METHODS, initial_words, initializers, word_names
from mixofshow.tuning.batches import make_batches, naming_for
from mixofshow.tuning.checkpoints import Identity, working_in
from mixofshow.tuning.conflicts import idle, refuse_impossible, slow_precision, tracker_of
from mixofshow.tuning.dataset import Example, inputs_of, read_folder
from mixofshow.tuning.losses import TrainingLoss, recorded_attention
from mixofshow.tuning.run import Callbacks, Finished, Preview, Run
from mixofshow.tuning.settings import TuningSettings, make_settings, with_presets

logger = logging.getLogger(__name__)

MAX_BASE_NAME: Final = 128
"""Characters that a concept file has room for."""


def tune(
    settings: Any,
    pipeline: Any = None,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    preview: Preview | None = None,
    stopped: Preview | None = None,
    finished: Finished | None = None,
    **keys: Any,
) -> Concept:
    """Tune a concept on a folder of pictures: `tune(pipeline, data, name=…, class_word=…, **settings)`.

    Or `tune(settings, pipeline)`, with settings that were made before. Where they say nothing, what holds is what this
    pipeline needs, whatever `base` they name. The pipeline is left as it was. Checkpoints and curves go to `folder`;
    without one there are none. `resume` goes on from its newest checkpoint, as if there had been no break. Ctrl-C ends
    early with what has been learned. A run that ends early hands that to `stopped`, if it is given, and raises its cause:
    KeyboardInterrupt, or DivergedError where the numbers are not finite any more. One that comes to its end hands the
    concept to `finished`; where that has no room for it, the last state is kept in `folder`. Raises DatasetError,
    TokenError, SettingsError, BaseModelError, ResourceError.
    """
    settings, pipeline = _asked(settings, pipeline, keys)
    family = family_of(pipeline).name
    place = None if folder is None else Path(folder)
    given, settings = settings, with_presets(settings, base_name(pipeline), family)
    refuse_impossible(settings, pipeline.device.type)
    check_outputs(shared=[place], inputs=inputs_of(settings))
    for notice in (*idle(given), slow_precision(settings, pipeline.device.type)):
        if notice:
            logger.warning("%s", notice)
    refuse_inpainting(pipeline, "tuning")
    refuse_adapters(pipeline, "tuning")
    refuse_hooks(pipeline, "tuning")
    with _own_accelerate():
        accelerator = make_accelerator(settings, pipeline, place)
        with working_in(place if accelerator.is_main_process else None):
            callbacks = Callbacks(progress, preview, stopped, finished)
            return _tune(settings, pipeline, accelerator, callbacks, place, resume=resume)


def _asked(first: Any, second: Any, keys: Mapping[str, Any]) -> tuple[TuningSettings, Any]:
    """Settings and pipeline of a call in either form. Raises SettingsError."""
    if not isinstance(first, TuningSettings):
        return make_settings({**keys, **({} if second is None else {"data": second})}), first
    if keys:
        raise SettingsError(f"tune: {', '.join(keys)} beside settings that are made; say it in one of both")
    return first, second


def examples_of(settings: TuningSettings) -> list[Example]:
    """What a run learns: pictures with their captions and masks. Raises DatasetError, SettingsError."""
    return read_folder(
        settings.data,
        instance_prompt=settings.instance_prompt or f"a photo of a {settings.placeholder}",
        skip_bad=settings.skip_bad,
        masks=settings.masks,
        alpha=settings.pictures.alpha,
        background=settings.pictures.background,
        naming=naming_for(settings),
    )


def digests(examples: Iterable[Example]) -> dict[str, str]:
    """By picture, what tells it apart, its caption and mask too."""
    return {one.name: one.digest for one in examples}


def _tune(
    settings: TuningSettings,
    pipeline: Any,
    accelerator: Accelerator,
    callbacks: Callbacks,
    folder: Path | None,
    *,
    resume: bool,
) -> Concept:
    examples = examples_of(settings)
    if settings.loss.attention_weight and not any(one.mask for one in examples):
        logger.warning("loss.attention_weight does nothing: no picture has a mask")
    words = initial_words(pipeline, settings, torch.Generator().manual_seed(settings.seed))
    info = _describe(settings, pipeline, len(words()))  # before the layers are wrapped: the fingerprint is of the base
    processes = accelerator.num_processes
    total = settings.steps_for(len(examples), processes)
    count = total * settings.optimizer.accumulate * processes
    batches = make_batches(settings, pipeline, examples, count=count, progress=callbacks.progress)
    encoders = [one.model for one in text_encoders(pipeline)]
    with (
        exclusive(pipeline),
        _seeded(settings.seed),
        METHODS[settings.method].adapters(pipeline, settings) as adapters,
        recomputing(pipeline.unet, encoders, on=settings.gradient_checkpointing),
        layerwise(pipeline.unet),
        recorded_attention(pipeline.unet) if settings.loss.attention_weight else contextlib.nullcontext() as maps,
    ):
        loss = TrainingLoss(pipeline, words, adapters, settings, maps)
        if (longest := loss.longest_word()) > LARGEST_EMBEDDING:
            raise SettingsError(
                f"words.sigma: {settings.words.sigma:g} makes words {longest:.3g} times as long as the base's own; a "
                f"concept file may hold {LARGEST_EMBEDDING:g}"
            )
        run = Run(settings, loss, batches, accelerator, callbacks, info=info, total=total)
        if folder:
            run.keep(folder, _identity(settings, digests(examples), info.base_fingerprint), resume=resume)
        run.to_the_end()
        return run.handed_over()


def _describe(settings: TuningSettings, pipeline: Any, layers: int) -> ConceptInfo:
    return ConceptInfo(
        name=settings.name,
        words=word_names(settings),
        class_word=settings.class_word,
        initializers=initializers(settings),
        layers=layers,
        family=family_of(pipeline).name,
        base=base_name(pipeline)[:MAX_BASE_NAME],
        base_fingerprint=fingerprint(pipeline),
        method=settings.method,
        rank=settings.unet.rank,
        alpha=settings.unet.alpha,
        settings=settings.for_file() | ({CLIP_SKIP: skip} if (skip := clip_skip_said(pipeline)) else {}),
        license=settings.license,
        author=settings.author,
    )


def _identity(settings: TuningSettings, pictures: Mapping[str, str], base_fingerprint: str) -> Identity:
    facts = {**settings.for_file(), "name": settings.name, "class_word": settings.class_word}
    facts["captions.synonyms"] = settings.captions.synonyms
    return Identity.of(facts, pictures, base_fingerprint=base_fingerprint)


def make_accelerator(settings: TuningSettings, pipeline: Any, folder: Path | None) -> Accelerator:
    """Device, precision, processes and trackers of a run. Raises SettingsError for what this machine cannot do."""
    if pipeline.unet.dtype not in (torch.float32, DTYPES[settings.precision]):
        held = str(pipeline.unet.dtype).removeprefix("torch.")
        raise SettingsError(f"precision {settings.precision}: the base's weights are {held}; load it as float32")
    tracker = tracker_of(settings)
    # Text that leaves out the text encoder's last layers leaves out their changes too.
    unused = settings.unet.drop_kv > 0 or any(one.skipped for one in text_encoders(pipeline))
    try:
        return Accelerator(
            mixed_precision={"fp32": "no"}.get(settings.precision, settings.precision),
            gradient_accumulation_steps=settings.optimizer.accumulate,
            cpu=pipeline.device.type == "cpu",
            device_placement=False,  # all stays where the pipeline is
            log_with=tracker if folder and tracker != "none" else None,
            project_dir=folder,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
    except ValueError as error:
        raise SettingsError(f"precision {settings.precision}: {error}") from error


@contextlib.contextmanager
def _own_accelerate() -> Iterator[None]:
    """Inside, accelerate knows nothing of what this program did with it before; afterwards it is as before.

    It keeps device and precision in tables for the whole process, and objects that are there go on using theirs.
    """
    kept = {one: vars(one)["_shared_state"] for one in (PartialState, AcceleratorState, GradientState)}
    try:
        for one in kept:
            one._shared_state = {}
        yield
    finally:
        for one, state in kept.items():
            one._shared_state = state


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, the CPU's global randomness (which peft starts its matrices from) is seeded; afterwards it is as before.

    `torch.manual_seed` would seed that of all other devices too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
