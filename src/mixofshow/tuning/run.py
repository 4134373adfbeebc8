"""One run of tuning: steps, checkpoints, previews, and the concept that comes of it."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.utils import get_total_norm

from mixofshow.bases.layers import kind_of
from mixofshow.concepts.concept import LARGEST_EMBEDDING, LARGEST_VALUE, Concept, ConceptInfo
from mixofshow.errors import BadInputError, DivergedError, ResourceError, ours
from mixofshow.progress import Progress
from mixofshow.tuning.batches import batch_generator
from mixofshow.tuning.changes import TrainedChange, keys_and_values, switched_off
from mixofshow.tuning.checkpoints import FOLDER, Identity, any_in, discard_but_newest, load, newest, save
from mixofshow.tuning.objective import Feed, Objective
from mixofshow.tuning.optimizers import make_optimizer, make_schedule
from mixofshow.tuning.settings import TuningSettings

logger = logging.getLogger(__name__)

MAY_GROW: Final = ("steps", "epochs")
SMALLEST_SCALE: Final = 2.0**-10
"""Of a loss in half precision: what overflows even so has no scale that fits."""
Preview = Callable[[Concept, int], None]
"""Called with the concept so far and the step."""
Finished = Callable[[Concept], None]
"""Called with the concept; raises ResourceError where there is no room for it."""


class Run:
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
            {"params": self._of_kind("text_encoder"), "lr": settings.text_encoder.rate},
            {"params": self._of_kind("unet"), "lr": settings.unet.rate},
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
        self.save_failed = False

    def _of_kind(self, kind: str) -> list[nn.Parameter]:
        named = self.changes.items()
        return [one for name, change in named if kind_of(name) == kind for one in change.parameters()]

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
            raise BadInputError(f"{found}: left by an earlier run; --resume goes on from it, removing it starts anew")
        config = {key: value for key, value in self.info.settings.items() if value is not None}
        self.accelerator.init_trackers("curves", config)

    def to_the_end(self, progress: Progress, preview: Preview | None, stopped: Preview | None) -> None:
        """All steps, or as many as Ctrl-C or numbers that are not finite leave: then what was learned is kept.

        It is handed to `stopped`, and the cause is raised; without `stopped`, Ctrl-C is the end like any other.
        """
        try:
            with interrupts_noted() as interrupted:
                self._steps(progress, preview, interrupted)
        except (KeyboardInterrupt, DivergedError) as cause:
            good = self._go_back_to_finite_numbers() and self.step > 0
            kept = "what was learned so far is kept" if good else "there is nothing to keep"
            logger.warning("stopped after step %d of %d; %s", self.step, self.total, kept)
            if good:
                self._save_at_the_end()
                if stopped and self.accelerator.is_main_process:
                    stopped(self.concept(), self.step)
            if stopped or isinstance(cause, DivergedError):
                raise
        finally:
            with contextlib.suppress(OSError):  # a full disk costs curves, not training
                self.accelerator.end_training()

    def _steps(self, progress: Progress, preview: Preview | None, interrupted: Callable[[], bool]) -> None:
        first, started = self.step, time.monotonic()
        while self.step < self.total:
            figures = self._one_step()
            self.step += 1
            with contextlib.suppress(OSError):
                self.accelerator.log(figures, step=self.step)
            speed = (self.step - first) / (time.monotonic() - started)
            progress(self.step, self.total, {"loss": figures["loss"], "steps/s": speed})
            self._save_if_due()
            if preview and _due(self.step, self.settings.preview_every) and self.accelerator.is_main_process:
                self._preview(preview)
            if interrupted():
                raise KeyboardInterrupt

    def _one_step(self) -> dict[str, float]:
        """One step of the optimizer, over `accumulate` batches; returns its figures. Raises DivergedError."""
        settings, sums = self.settings, dict[str, float]()
        for part in range(settings.optimizer.accumulate):
            number = self.step * settings.optimizer.accumulate + part
            number = number * self.accelerator.num_processes + self.accelerator.process_index
            with self.accelerator.accumulate(self.model), switched_off(self._dropped(number)):
                figures = self.model(*[feed.batch(number, self.objective.scheduler) for feed in self.feeds])
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
        if self.objective.length_of_words() >= settings.words.norm_limit:
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
            "the longest word, in usual lengths,": (self.objective.longest_word(), LARGEST_EMBEDDING),
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
            with switched_off(self.changes.values()):  # a preview puts the concept on by itself
                preview(self.concept(), self.step)
        except Exception as error:
            if (known := ours(error)) is None:
                raise
            logger.warning("no preview of step %d (%s); training goes on", self.step, known)

    def _dropped(self, number: int) -> Iterable[TrainedChange]:
        """The keys and values that batch `number` goes without."""
        chance = self.settings.unet.drop_kv
        # A generator of its own, so that the option changes nothing else that is random.
        drawn = torch.rand((), generator=batch_generator(self.settings.seed + 1, number)) if chance else 1.0
        return keys_and_values(self.changes).values() if drawn < chance else ()

    def _save_if_due(self) -> None:
        """A failed save costs no training: the next one tries again. Raises ResourceError at the second in a row."""
        if not _due(self.step, self.settings.save_every) or self.step >= self.total:
            return
        try:
            self._save()
            self.save_failed = False
        except ResourceError as error:
            if self.save_failed:
                raise
            self.save_failed = True
            logger.warning("%s; training goes on, and the next checkpoint is tried as usual", error)

    def _save_at_the_end(self) -> None:
        """There is no next one to try, so a save that fails is tried again at once. Raises ResourceError."""
        try:
            self._save()
        except ResourceError as error:
            logger.warning("%s; tried once more", error)
            self._save()

    def handed_over(self, finished: Finished | None) -> Concept:
        """The concept, also to `finished`: a second time if that has no room, with what an older checkpoint took."""
        concept = self.concept()
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
                kept = newest(self.folder) or "no checkpoint"
                raise ResourceError(
                    f"{error}; kept: {kept}; make room, and repeat the command with --resume"
                ) from error
        return concept

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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
