"""The client's training loop: pictures of one concept to a Concept, by any method."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mixofshow.bases.families import family_of
from mixofshow.bases.loading import fingerprint
from mixofshow.concepts.concept import Concept, ConceptInfo
from mixofshow.concepts.prompts import layerwise
from mixofshow.concepts.words import Vocabulary, token_ids
from mixofshow.errors import BadInputError, SettingsError
from mixofshow.progress import Progress, silent
from mixofshow.tuning.attention import recorded_attention
from mixofshow.tuning.batches import Order, Source, batch_generator
from mixofshow.tuning.changes import TrainedChange, keys_and_values, switched_off
from mixofshow.tuning.checkpoints import Identity, load, newest, save
from mixofshow.tuning.dataset import Example, read_folder, with_placeholder
from mixofshow.tuning.methods import METHODS, initial_words, initializers, word_names
from mixofshow.tuning.objective import Feed, Objective
from mixofshow.tuning.optimizers import make_optimizer, make_schedule
from mixofshow.tuning.prior import prior_examples
from mixofshow.tuning.settings import TuningSettings

logger = logging.getLogger(__name__)

MAY_GROW: Final = ("steps", "epochs")
Preview = Callable[[Concept, int], None]
"""Called with the concept so far and the step."""


def tune(
    settings: TuningSettings,
    pipeline: Any,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    preview: Preview | None = None,
) -> Concept:
    """Tune a concept on a folder of pictures; the pipeline is left as it was.

    Checkpoints and curves go to `folder`; without one there are none. `resume` goes on from its newest checkpoint, as
    if there had been no break. Ctrl-C ends early with what has been learned. Raises DatasetError, TokenError,
    SettingsError, ResourceError.
    """
    accelerator = make_accelerator(settings, pipeline, folder)
    examples = read_folder(
        settings.data,
        instance_prompt=settings.instance_prompt or f"a photo of a {settings.placeholder}",
        skip_bad=settings.skip_bad,
        masks=settings.masks,
        alpha=settings.pictures.alpha,
        background=settings.pictures.background,
    )
    words = initial_words(pipeline, settings, torch.Generator().manual_seed(settings.seed))
    info = _describe(settings, pipeline, len(words()))  # before the layers are wrapped: the fingerprint is of the base
    total = settings.steps_for(len(examples), accelerator.num_processes)
    feeds = list(_feeds(settings, pipeline, examples, total=total, accelerator=accelerator, progress=progress))
    method = METHODS[settings.method]
    with (
        _seeded(settings.seed),
        method.changes(pipeline, settings) as changes,
        _recomputing(pipeline, settings.gradient_checkpointing),
        layerwise(pipeline.unet),
        recorded_attention(pipeline.unet) if settings.loss.attention_weight else contextlib.nullcontext() as maps,
    ):
        objective = Objective(pipeline, words, changes, settings, maps)
        run = _Run(settings, objective, feeds, accelerator, info=info, total=total)
        if folder:
            run.keep(folder, _identity(settings, examples, info), resume=resume)
        run.to_the_end(progress, preview)
        return run.concept()


def make_accelerator(settings: TuningSettings, pipeline: Any, folder: Path | None) -> Accelerator:
    """Device, precision, processes and trackers of a run. Raises SettingsError for what this machine cannot do."""
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    tracker = {"auto": "tensorboard" if find_spec("tensorboard") else "none"}.get(settings.tracker, settings.tracker)
    if tracker != "none" and not find_spec(tracker):
        raise SettingsError(f"tracker {tracker} is not installed: pip install {tracker}")
    try:
        return Accelerator(
            mixed_precision={"fp32": "no"}.get(settings.precision, settings.precision),
            gradient_accumulation_steps=settings.optimizer.accumulate,
            cpu=pipeline.device.type == "cpu",
            log_with=tracker if folder and tracker != "none" else None,
            project_dir=folder,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=settings.unet.drop_kv > 0)],
        )
    except ValueError as error:
        raise SettingsError(f"precision {settings.precision}: {error}") from error


def _feeds(
    settings: TuningSettings,
    pipeline: Any,
    examples: Sequence[Example],
    *,
    total: int,
    accelerator: Accelerator,
    progress: Progress,
) -> Iterator[Feed]:
    """The concept's pictures, and those of its class word if the prior counts."""
    names = word_names(settings)
    known = Vocabulary(dict.fromkeys(names, torch.empty(0)), {settings.placeholder: names} if len(names) > 1 else {})
    table = pipeline.text_encoder.get_input_embeddings().num_embeddings
    length = pipeline.text_encoder.config.max_position_embeddings

    def tokenize(captions: Sequence[str]) -> Tensor:
        ids = [token_ids(caption, pipeline.tokenizer, known, table, length) for caption in captions]
        return torch.tensor(ids, device=pipeline.text_encoder.device)

    def feed(chosen: Sequence[Example], texts: Sequence[str], **changed: Any) -> Feed:
        own = settings.model_copy(update=changed)
        source = Source(chosen, own.pictures, pipeline, seed=own.seed)
        batches = total * own.optimizer.accumulate * accelerator.num_processes
        order = Order(source.groups, own.batch_size, batches=batches, seed=own.seed)
        tokenize(texts)  # words that would be cut are found before the first step
        return Feed(source, order, texts, own, tokenize)

    yield feed(
        examples,
        [with_placeholder(one.caption, settings.placeholder, names, settings.class_word) for one in examples],
    )
    prior = prior_examples(settings, pipeline, progress)
    plain = type(settings.captions)()  # the class word's pictures keep their caption
    if prior:
        yield feed(prior, [one.caption for one in prior], captions=plain)


def _describe(settings: TuningSettings, pipeline: Any, layers: int) -> ConceptInfo:
    return ConceptInfo(
        name=settings.name,
        words=word_names(settings),
        class_word=settings.class_word,
        initializers=initializers(settings),
        layers=layers,
        family=family_of(pipeline).name,
        base=settings.base.rstrip("/").rsplit("/", 1)[-1],
        base_fingerprint=fingerprint(pipeline),
        method=settings.method,
        rank=settings.unet.rank,
        alpha=settings.unet.alpha,
        settings=settings.for_file(),
        license=settings.license,
        author=settings.author,
    )


def _identity(settings: TuningSettings, examples: Sequence[Example], info: ConceptInfo) -> Identity:
    facts = {**settings.for_file(), "name": settings.name, "class_word": settings.class_word}
    return Identity.of(facts, {one.name: one.digest for one in examples}, base_fingerprint=info.base_fingerprint)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global randomness (which peft starts its matrices from) is seeded; afterwards it is as before."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextlib.contextmanager
def _recomputing(pipeline: Any, on: bool) -> Iterator[None]:
    """Inside, if `on`, activations are computed again in the backward pass instead of being kept."""
    if not on:
        yield
        return
    try:
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.text_encoder.activation_checkpointing_enable({"use_reentrant": False})
        pipeline.text_encoder.train()  # transformers recomputes only while training; CLIP has no dropout
        yield
    finally:
        pipeline.unet.disable_gradient_checkpointing()
        pipeline.text_encoder.activation_checkpointing_disable()
        pipeline.text_encoder.eval()


class _Run:
    """State of one run: what is trained, the optimizer, its schedule, and whether the words may still move."""

    def __init__(
        self,
        settings: TuningSettings,
        objective: Objective,
        feeds: Sequence[Feed],
        accelerator: Accelerator,
        *,
        info: ConceptInfo,
        total: int,
    ) -> None:
        self.settings, self.objective, self.feeds, self.accelerator = settings, objective, feeds, accelerator
        self.info, self.total, self.step, self.words_move = info, total, 0, True
        self.words, self.changes = objective.words, objective.changes
        groups: list[dict[str, Any]] = [
            {"params": [self.words.moving], "lr": settings.words.rate},
            {"params": self._of_part("text_encoder"), "lr": settings.text_encoder.rate},
            {"params": self._of_part("unet"), "lr": settings.unet.rate},
        ]
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.model, self.optimizer = accelerator.prepare(
            objective, make_optimizer(settings.optimizer, [group for group in groups if group["params"]])
        )
        self.schedule = make_schedule(settings.optimizer, self.optimizer, total)
        decay = settings.optimizer.ema
        self.average = EMAModel(self.trained, decay=decay, use_ema_warmup=True, power=0.75) if decay else None
        self.folder: Path | None = None
        self.identity: Identity | None = None

    def _of_part(self, part: str) -> list[nn.Parameter]:
        named = self.changes.items()
        return [one for name, change in named if name.startswith(f"{part}.") for one in change.parameters()]

    def keep(self, folder: Path, identity: Identity, *, resume: bool) -> None:
        """Leave checkpoints and curves in `folder` from now on; with `resume`, go on from the newest first."""
        self.folder, self.identity = folder / "checkpoints", identity
        if resume:
            self.step, state = load(self.folder, identity, may_grow=MAY_GROW)
            self._take(state)
            logger.warning("going on from step %d of %d", self.step, self.total)
        elif found := newest(self.folder):
            raise BadInputError(f"{found}: left by an earlier run; --resume goes on from it, removing it starts anew")
        config = {key: value for key, value in self.info.settings.items() if value is not None}
        self.accelerator.init_trackers("curves", config)

    def to_the_end(self, progress: Progress, preview: Preview | None) -> None:
        """All steps, or as many as Ctrl-C leaves."""
        first, started = self.step, time.monotonic()
        try:
            while self.step < self.total:
                figures = self._one_step()
                self.step += 1
                self.accelerator.log(figures, step=self.step)
                speed = (self.step - first) / (time.monotonic() - started)
                progress(self.step, self.total, {"loss": figures["loss"], "steps/s": speed})
                self._save_if_due()
                if preview and _due(self.step, self.settings.preview_every) and self.accelerator.is_main_process:
                    with switched_off(self.changes.values()):  # a preview puts the concept on by itself
                        preview(self.concept(), self.step)
        except KeyboardInterrupt:
            logger.warning("stopped at step %d of %d; what was learned so far is kept", self.step, self.total)
            self._save()
        self.accelerator.end_training()

    def _one_step(self) -> dict[str, float]:
        """One step of the optimizer, over `accumulate` batches; returns its figures."""
        settings, sums = self.settings, dict[str, float]()
        for part in range(settings.optimizer.accumulate):
            number = self.step * settings.optimizer.accumulate + part
            number = number * self.accelerator.num_processes + self.accelerator.process_index
            with self.accelerator.accumulate(self.model), switched_off(self._dropped(number)):
                figures = self.model(*[feed.batch(number, self.objective.scheduler) for feed in self.feeds])
                self.accelerator.backward(figures["loss"])
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trained, settings.optimizer.max_grad_norm)
                    if not self.words_move:
                        self.words.moving.grad = None
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / settings.optimizer.accumulate
        self.schedule.step()
        if self.average:
            self.average.step(self.trained)
        if self.words().detach().norm(dim=-1).mean() >= settings.words.norm_limit:
            self.words_move = False
        return sums

    def _dropped(self, number: int) -> Iterable[TrainedChange]:
        """The keys and values that batch `number` goes without."""
        chance = self.settings.unet.drop_kv
        # A generator of its own, so that the option changes nothing else that is random.
        drawn = torch.rand((), generator=batch_generator(self.settings.seed + 1, number)) if chance else 1.0
        return keys_and_values(self.changes).values() if drawn < chance else ()

    def _save_if_due(self) -> None:
        if _due(self.step, self.settings.save_every) and self.step < self.total:
            self._save()

    def _save(self) -> None:
        if self.folder and self.identity and self.accelerator.is_main_process:
            save(self.folder, self.step, self._state(), self.identity)

    def _state(self) -> dict[str, Any]:
        return {
            "trained": [parameter.detach() for parameter in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "average": self.average.state_dict() if self.average else {},
            "words_move": self.words_move,
        }

    @torch.no_grad()
    def _take(self, state: Mapping[str, Any]) -> None:
        for parameter, saved in zip(self.trained, state["trained"], strict=True):
            parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.words_move = state["words_move"]

    @torch.no_grad()
    def concept(self) -> Concept:
        """What has been learned so far."""
        info = self.info.model_copy(update={"settings": {**self.info.settings, "steps": self.step}})
        if self.average:
            self.average.store(self.trained)
            self.average.copy_to(self.trained)
        try:
            vectors = self.words().cpu().transpose(0, 1).contiguous().half().float()
            return Concept(info, vectors, {name: change.finished() for name, change in self.changes.items()})
        finally:
            if self.average:
                self.average.restore(self.trained)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
