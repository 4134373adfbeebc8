"""One run of tuning: steps, checkpoints, previews, and the concept that comes of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mixofshow.bases.layers import kind_of
from mixofshow.concepts.concept import LARGEST_EMBEDDING, LARGEST_VALUE, Concept, ConceptInfo
from mixofshow.errors import BadInputError, DivergedError, ResourceError, SettingsError, ours
from mixofshow.progress import Progress
from mixofshow.tuning.adapters import Adapter, keys_and_values, switched_off
from mixofshow.tuning.batches import Batches, batch_generator
from mixofshow.tuning.checkpoints import FOLDER, Identity, any_in, discard_but_newest, load, newest, save
from mixofshow.tuning.losses import TrainingLoss
from mixofshow.tuning.settings import OptimizerSettings, TuningSettings

logger = logging.getLogger(__name__)

OPTIMIZERS: Final = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": ("prodigyopt", "Prodigy"),
}
"""The module and the name of each."""
MAY_GROW: Final = ("steps", "epochs")
SMALLEST_SCALE: Final = 2.0**-10
"""Of a loss in half precision: what overflows even so has no scale that fits."""
Preview = Callable[[Concept, int], None]
"""Called with the concept so far and the step."""
Finished = Callable[[Concept], None]
"""Called with the concept; raises ResourceError where there is no room for it."""


@dataclass(frozen=True)
class Callbacks:
    """What is called on the way, as `tune` says."""

    progress: Progress
    preview: Preview | None
    stopped: Preview | None
    finished: Finished | None


class Run:
    """State of one run: what is trained, the optimizer, its schedule, and whether the words may still move."""

    def __init__(
        self,
        settings: TuningSettings,
        loss: TrainingLoss,
        batches: Sequence[Batches],
        accelerator: Accelerator,
        callbacks: Callbacks,
        *,
        info: ConceptInfo,
        total: int,
    ) -> None:
        self.settings, self.loss, self.batches, self.accelerator = settings, loss, batches, accelerator
        self.callbacks, self.info, self.total, self.step, self.words_move = callbacks, info, total, 0, True
        self.words, self.adapters = loss.words, loss.adapters
        groups: list[dict[str, Any]] = [{"params": [self.words.moving], "lr": settings.words.rate}]
        for part in ("text_encoder", "unet"):
            adapters = [adapter for name, adapter in self.adapters.items() if kind_of(name) == part]
            if parameters := [parameter for adapter in adapters for parameter in adapter.parameters()]:
                groups.append({"params": parameters, "lr": getattr(settings, part).rate})
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.model, self.optimizer = accelerator.prepare(loss, make_optimizer(settings.optimizer, groups))
        schedule, warmup = settings.optimizer.schedule, settings.optimizer.warmup
        name = "constant_with_warmup" if schedule == "constant" else schedule
        self.schedule = get_scheduler(name, self.optimizer, num_warmup_steps=warmup, num_training_steps=total)
        decay = settings.optimizer.ema
        self.average = EMAModel(self.trained, decay=decay, use_ema_warmup=True, power=0.75) if decay else None
        self.folder: Path | None = None
        self.identity: Identity | None = None
        self.save_failed = False

    def keep(self, folder: Path, identity: Identity, *, resume: bool) -> None:
        """Leave checkpoints and curves in `folder` from now on; with `resume`, go on from the newest if there is one."""
        self.folder, self.identity = folder / FOLDER, identity
        if resume and not any_in(self.folder):
            logger.warning("%s: no checkpoint yet; beginning at the first step", self.folder)
        elif resume:
            self.step, state = load(self.folder, identity, may_grow=MAY_GROW)
            self._take(state)
            logger.warning("going on from step %d of %d", self.step, self.total)
        elif found := newest(self.folder):
            raise BadInputError(f"{found}: left by an earlier run; `resume` goes on from it, removing it starts anew")
        config = {key: value for key, value in self.info.settings.items() if value is not None}
        self.accelerator.init_trackers("curves", config)

    def to_the_end(self) -> None:
        """All steps, or as many as Ctrl-C or numbers that are not finite leave: then what was learned is kept.

        It is handed to `stopped`, and the cause is raised; without `stopped`, Ctrl-C is the end like any other.
        """
        stopped = self.callbacks.stopped
        try:
            with interrupts_noted() as interrupted:
                self._steps(interrupted)
        except (KeyboardInterrupt, DivergedError) as cause:
            good = self._go_back_to_finite_numbers() and self.step > 0
            kept = "what was learned so far is kept" if good else "there is nothing to keep"
            logger.warning("stopped after step %d of %d; %s", self.step, self.total, kept)
            if good:
                try:
                    self._save()
                except ResourceError as error:  # there is no next one to try
                    logger.warning("%s; tried once more", error)
                    self._save()
                if stopped and self.accelerator.is_main_process:
                    stopped(self.concept(), self.step)
            if stopped or isinstance(cause, DivergedError):
                raise
        finally:
            with contextlib.suppress(OSError):  # a full disk costs curves, not training
                self.accelerator.end_training()

    def _steps(self, interrupted: Callable[[], bool]) -> None:
        first, started = self.step, time.monotonic()
        while self.step < self.total:
            figures = self._one_step()
            self.step += 1
            with contextlib.suppress(OSError):
                self.accelerator.log(figures, step=self.step)
            speed = (self.step - first) / (time.monotonic() - started)
            self.callbacks.progress(self.step, self.total, {"loss": figures["loss"], "steps/s": speed})
            if self._is_due(self.settings.save_every) and self.step < self.total:
                self._save_on_the_way()
            preview = self.callbacks.preview
            if preview and self._is_due(self.settings.preview_every) and self.accelerator.is_main_process:
                self._preview(preview)
            if interrupted():
                raise KeyboardInterrupt

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _one_step(self) -> dict[str, float]:
        """One step of the optimizer, over `accumulate` batches; returns its figures. Raises DivergedError."""
        settings, sums = self.settings, dict[str, float]()
        for part in range(settings.optimizer.accumulate):
            number = self.step * settings.optimizer.accumulate + part
            number = number * self.accelerator.num_processes + self.accelerator.process_index
            with self.accelerator.accumulate(self.model), switched_off(self._dropped(number)):
                figures = self.model(*[batches.batch(number, self.loss.scheduler) for batches in self.batches])
                self.accelerator.backward(figures["loss"])
                for name, value in figures.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / settings.optimizer.accumulate
                if self.accelerator.sync_gradients:
                    length = self.accelerator.clip_grad_norm_(self.trained, settings.optimizer.max_grad_norm)
                    self._require_finite(sums, length)
                    if not self.words_move:
                        self.words.moving.grad = None
                self.optimizer.step()
                self.optimizer.zero_grad()
        for what, (value, largest) in self._sizes().items():
            if not value <= largest:
                raise self._diverged(what, value)
        self.schedule.step()
        if self.average:
            self.average.step(self.trained)
        if self.loss.length_of_words() >= settings.words.norm_limit:
            self.words_move = False
        return sums

    def _require_finite(self, figures: Mapping[str, float], length: Any) -> None:
        """Raises DivergedError for a loss or a gradient that is not finite."""
        for name, value in figures.items():
            if not isfinite(value):
                raise self._diverged("the loss" if name == "loss" else f"the loss of {name}", value)
        # In half precision a gradient may overflow: then its step is left out, and the next is taken at half the scale.
        scaler = self.accelerator.scaler
        if not isfinite(length) and (scaler is None or scaler.get_scale() < SMALLEST_SCALE):
            raise self._diverged("the gradient", length)

    def _diverged(self, what: str, value: Any) -> DivergedError:
        way_out = "use bf16 or fp32, or lower" if self.settings.precision == "fp16" else "lower"
        return DivergedError(
            f"step {self.step + 1}: {what} is {float(value):.3g}; training stopped; {way_out} the rates "
            "(words.rate, text_encoder.rate, unet.rate)"
        )

    def _sizes(self) -> dict[str, tuple[float, float]]:
        """How large what is trained is, and how large it may be in a concept file that is to be read again."""
        return {
            "the largest number of words and weights": (float(get_total_norm(self.trained, inf)), LARGEST_VALUE),
            "the longest word, in usual lengths,": (self.loss.longest_word(), LARGEST_EMBEDDING),
        }

    def _go_back_to_finite_numbers(self) -> bool:
        """To the newest checkpoint if what is trained is not good any more; returns whether there is anything good."""
        if all(value <= largest for value, largest in self._sizes().values()):
            return True
        if not (self.folder and self.identity and newest(self.folder)):
            return False
        self.step, state = load(self.folder, self.identity, may_grow=MAY_GROW)
        self._take(state)
        return True

    def _preview(self, preview: Preview) -> None:
        """A preview that fails costs no training."""
        try:
            with switched_off(self.adapters.values()):  # a preview puts the concept on by itself
                preview(self.concept(compact=False), self.step)
        except Exception as error:
            if (known := ours(error)) is None:
                raise
            logger.warning("no preview of step %d (%s); training goes on", self.step, known)

    def _dropped(self, number: int) -> Iterable[Adapter]:
        """The keys and values that batch `number` goes without."""
        chance = self.settings.unet.drop_kv
        # A generator of its own, so that the option changes nothing else that is random.
        drawn = torch.rand((), generator=batch_generator(self.settings.seed + 1, number)) if chance else 1.0
        return keys_and_values(self.adapters).values() if drawn < chance else ()

    def _save_on_the_way(self) -> None:
        """A failed save costs no training: the next one tries again. Raises ResourceError at the second in a row."""
        try:
            self._save()
            self.save_failed = False
        except ResourceError as error:
            if self.save_failed:
                raise
            self.save_failed = True
            logger.warning("%s; training goes on, and the next checkpoint is tried as usual", error)

    def handed_over(self) -> Concept:
        """The concept, also to `finished`: a second time if that has no room, with what an older checkpoint took."""
        concept, finished = self.concept(), self.callbacks.finished
        if not (finished and self.accelerator.is_main_process):
            return concept
        try:
            finished(concept)
        except ResourceError as error:
            if not self.folder:
                raise
            discard_but_newest(self.folder)
            try:
                finished(concept)
            except ResourceError:
                with contextlib.suppress(ResourceError):
                    self._save()
                what = f"kept: {newest(self.folder) or 'no checkpoint'}; make room, and go on with `resume`"
                raise ResourceError(f"{error}; {what}") from error
        return concept

    def _save(self) -> None:
        if self.folder and self.identity and self.accelerator.is_main_process:
            save(self.folder, self.step, self._state(), self.identity)

    def _stateful(self) -> dict[str, Any]:
        """What a checkpoint holds beside the trained numbers; None for what this run has not."""
        named = {"optimizer": self.optimizer, "schedule": self.schedule}
        return {**named, "scaler": self.accelerator.scaler, "average": self.average}

    def _state(self) -> dict[str, Any]:
        states = {name: one.state_dict() if one else {} for name, one in self._stateful().items()}
        trained = [parameter.detach() for parameter in self.trained]
        return {"trained": trained, **states, "words_move": self.words_move}

    @torch.no_grad()
    def _take(self, state: Mapping[str, Any]) -> None:
        for parameter, saved in zip(self.trained, state["trained"], strict=True):
            parameter.copy_(saved)
        for name, one in self._stateful().items():
            if one:
                one.load_state_dict(state[name])
        if self.average:
            self.average.to(self.trained[0].device)  # it leaves what was read where that is, on the CPU
        self.words_move = state["words_move"]

    @torch.no_grad()
    def concept(self, *, compact: bool = True) -> Concept:
        """What has been learned so far, `compact` as `Adapter.finished` has it."""
        info = self.info.model_copy(update={"settings": {**self.info.settings, "steps": self.step}})
        if self.average:
            self.average.store(self.trained)
            self.average.copy_to(self.trained)
        try:
            vectors = self.words().cpu().transpose(0, 1).contiguous().half().float()
            changes = {name: adapter.finished(compact=compact) for name, adapter in self.adapters.items()}
            return Concept(info, vectors, changes)
        finally:
            if self.average:
                self.average.restore(self.trained)


@contextlib.contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted, and the function that is yielded tells; the second is as usual."""
    before, noted = signal.getsignal(signal.SIGINT), list[bool]()

    def note(*_: object) -> None:
        noted.append(True)
        signal.signal(signal.SIGINT, before)

    # Other threads hear no signals; and who starts us without Ctrl-C, as a shell in the background, wants it so.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def make_optimizer(settings: OptimizerSettings, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer over parameter groups, each with its own rate. Raises SettingsError when its library is missing."""
    module, name = OPTIMIZERS[settings.name]
    try:
        optimizer: Callable[..., Optimizer] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.split(".", maxsplit=1)[0]
        raise SettingsError(f"optimizer {name} is not installed: pip install {package}") from error
    return optimizer(groups, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay)
