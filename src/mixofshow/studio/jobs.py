"""What takes a while: one job after another in a thread of its own, whoever looks on, and whether or not anybody does."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image

from mixofshow.errors import ours, printable

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "stopped", "failed"]
KEPT: Final = 50
"""Jobs that are remembered."""
POINTS: Final = 2000
"""Of a curve."""


@dataclass
class Job:
    """One of them: what it is, how far it has come, and what came of it. Only its own thread changes it, but for `stopping`."""

    kind: str
    title: str
    state: State = "waiting"
    now: str = ""
    done: int = 0
    total: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    preview: Image.Image | None = None
    results: Sequence[Path] = ()
    facts: Any = None
    said: list[str] = field(default_factory=list)
    error: str = ""
    started: float = 0.0
    before: int = 0
    stopping: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "stopped", "failed")

    def progress(self, step: int, total: int, info: Mapping[str, float]) -> None:
        """How far it has come. Raises KeyboardInterrupt, as Ctrl-C does, if it is to stop."""
        if not self.total:
            self.started, self.before = time.monotonic(), step  # what was loaded before says nothing about the rest
        self.done, self.total, self.figures = step, total, dict(info)
        if "loss" in info and len(self.curve) < POINTS:
            self.curve.append((step, float(info["loss"])))
        self.go_on()

    def go_on(self) -> None:
        """Raise KeyboardInterrupt if it is to stop."""
        if self.stopping:
            raise KeyboardInterrupt

    @property
    def line(self) -> str:
        """Where it stands, in one line."""
        if self.state == "waiting":
            return f"{self.title}: waits for what is at work"
        if self.state == "running":
            now = f", {self.now}" if self.now else ""
            figures = "".join(
                f", {name} {value:.3g}" for name, value in self.figures.items() if not name.endswith("/s")
            )
            far = f": {self.done} of {self.total}{figures}" if self.total else ""
            return f"{self.title}{far}{now}{self._left()}" if far else f"{self.title}{now} …"
        return {"done": f"{self.title}: done", "stopped": f"{self.title}: stopped", "failed": self.error}[self.state]

    def _left(self) -> str:
        if not self.before < self.done < self.total or self.stopping:
            return ""
        seconds = (time.monotonic() - self.started) / (self.done - self.before) * (self.total - self.done)
        return f", about {in_time(seconds)} left"


def in_time(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


Work = Callable[[Job], Sequence[Path]]
"""What a job does; returns the files that came of it. Its notices go to `said`."""


class Jobs:
    """A queue with one worker, because there is one model at a time. Ends with the process."""

    def __init__(self) -> None:
        self.all: deque[Job] = deque(maxlen=KEPT)
        self._waiting: deque[tuple[Job, Work]] = deque()
        self._news = threading.Condition()
        self._worker: threading.Thread | None = None

    def submit(self, kind: str, title: str, work: Work, *, facts: Any = None) -> Job:
        """A new job at the end of the queue; `facts` are what the page must know of it."""
        job = Job(kind, title, facts=facts)
        with self._news:
            self.all.append(job)
            self._waiting.append((job, work))
            if self._worker is None:
                self._worker = threading.Thread(target=self._serve, daemon=True, name="studio")
                self._worker.start()
            self._news.notify()
        return job

    def latest(self, kind: str) -> Job | None:
        """The one of a kind that is at work; else the first that waits; else the last that is over."""
        of_kind = [job for job in self.all if job.kind == kind]
        return next((job for job in of_kind if not job.over), of_kind[-1] if of_kind else None)

    def waiting(self, kind: str) -> int:
        """How many of a kind wait for their turn."""
        return sum(job.kind == kind and job.state == "waiting" for job in self.all)

    def stop(self, kind: str | None = None) -> None:
        """Stop what is at work of a kind (of any, without one), and what waits: as Ctrl-C would."""
        with self._news:
            for job in self.all:
                if kind in (None, job.kind) and not job.over:
                    job.stopping = True
                    if job.state == "waiting":
                        job.state = "stopped"

    def close(self, seconds: float = 60) -> None:
        """Stop everything, and wait for what keeps what it has done so far; no longer than so long."""
        self.stop()
        with self._news:
            self._news.wait_for(lambda: all(job.over for job in self.all), seconds)

    def wait(self, job: Job, seconds: float = 600) -> Job:
        """The job once it is over, or after so long."""
        with self._news:
            self._news.wait_for(lambda: job.over, seconds)
        return job

    def _serve(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: bool(self._waiting))
                job, work = self._waiting.popleft()
                if job.over:
                    continue
                job.state = "running"
            state = _done(job, work)
            with self._news:
                job.state = state
                self._news.notify_all()


def _done(job: Job, work: Work) -> State:
    try:
        with noticed(job.said):
            job.results = tuple(work(job))
    except KeyboardInterrupt:
        return "stopped"
    except Exception as error:
        job.error = told(error)
        return "failed"
    return "done"


def told(error: Exception) -> str:
    """An error's one line; that of a fault of ours goes with its traceback to the log."""
    if (known := ours(error)) is not None:
        return str(known)
    logger.error("a fault of the program", exc_info=error)
    return printable(f"a fault of the program ({type(error).__name__}: {error}); the terminal shows where")


@contextlib.contextmanager
def noticed(said: list[str]) -> Iterator[None]:
    """Inside, what the package says to the log from this thread is also added to the list."""
    handler = _Notes(said)
    root = logging.getLogger("mixofshow")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Notes(logging.Handler):
    """Of notices that differ only in what they name, the first; the terminal has the others."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said, self.thread, self.kinds = said, threading.get_ident(), set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread and not record.exc_info and str(record.msg) not in self.kinds:
            self.said.append(printable(record.getMessage()))
            self.kinds.add(str(record.msg))


def outcome(act: Callable[[], Any]) -> tuple[Any, list[str], str]:
    """What a quick action gives, what it said, and its error's line: (None, …, "…") where it failed."""
    said: list[str] = []
    try:
        with noticed(said):
            return act(), said, ""
    except Exception as error:
        return None, said, told(error)
