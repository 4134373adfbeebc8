"""What the page asks of a composition: from its parts to a Composition and back, and the job that draws it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

from mixofshow.errors import MixOfShowError, SettingsError, shown
from mixofshow.replaceable import COMPOSITION
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.pictures import read_picture
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.redo import redo_composition
from mixofshow.sampling.replay import composition_of, read_note
from mixofshow.sampling.settings import Composition
from mixofshow.studio.advice import advice, completed
from mixofshow.studio.drawing import OWN, Engine, Order, check, command, draw, order, shelf_of
from mixofshow.studio.editor import regions_of, shrunk, thumbnail, value_of
from mixofshow.studio.forms import Field, fields_of, table_of, values_of
from mixofshow.studio.jobs import Job, Jobs
from mixofshow.studio.sketching import is_here
from mixofshow.studio.web import many
from mixofshow.studio.workspace import Workspace, changed_at

logger = logging.getLogger(__name__)

PLAIN: Final = ("prompt", "negative_prompt", "width", "height", "seed", "num")
"""The keys that stand beside the canvas."""
GIVEN: Final = ("image", "mask", "controls", "redo", "redo_margin")
"""Keys of what is drawn from pictures, which no visitor types."""
ON_THE_PAGE: Final = (*PLAIN, "regions", "regional_lora", *GIVEN)
"""Of a composition's keys, those that are not in the form."""
MOST_AT_ONCE: Final = 64
"""Pictures that one click draws, at most."""


@dataclass
class Changes:
    """Of what is on the canvas: how many there were, up to which each open page shows them, and which pages came too late.

    A page that was opened before the studio was started again shows what was there then; what is done by no page counts.
    """

    count: int = 0
    shown: dict[str, int] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, page: str) -> None:
        """A page that shows what is there now."""
        self.shown[page] = self.count

    def make(self, page: str, change: Callable[[], None]) -> None:
        """Change it, unless what this page shows is older than what another has put there meanwhile."""
        with self.lock:
            if page and self.shown.get(page, 0) < self.count:
                self.late.add(page)
                return
            change()
            self.count += 1
            if page in self.shown:
                self.shown[page] = self.count

    def news(self, page: str) -> str:
        """That another page has changed it since this one looked last, in a line; empty where none has."""
        with self.lock:
            before, self.shown[page] = self.shown.get(page, 0), self.count
            lost = page in self.late
            self.late.discard(page)
        if before == self.count:
            return ""
        return "another page has changed this" + ("; what was done here at the same moment is not kept" if lost else "")


@dataclass(frozen=True)
class Studio:
    """All that the tabs share: the workspace, what is at work, the model that drew last, and the base's usual size."""

    workspace: Workspace
    size: tuple[int, int] = (64, 64)
    jobs: Jobs = field(default_factory=Jobs)
    changes: Changes = field(default_factory=Changes)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", Engine(self.workspace))

    @classmethod
    def open(cls, workspace: Workspace) -> Studio:
        """On a workspace, its base loaded once to see that it is there. Raises BaseModelError, ResourceError."""
        workspace.open()
        studio = cls(workspace)
        pipeline: MixOfShowPipeline = studio.engine.pipeline(Order(workspace.canvas), Composition(prompt=""))
        return replace(studio, size=Composition(prompt="").size(pipeline))

    def size_of(self, composition: Composition) -> tuple[int, int]:
        """(width, height) that it will have, as far as it says."""
        return composition.width or self.size[0], composition.height or self.size[1]


@cache
def more_fields() -> list[Field]:
    """The settings without a place of their own."""
    return fields_of(Composition.model_json_schema(), leave_out=ON_THE_PAGE)


def composition_from(canvas: Any, *values: Any) -> Composition:
    """A composition out of the page's parts, checked: the editor's value, those of PLAIN, of `more_fields`, and `given_of`.

    No file is read, whatever names stand in it. Raises SettingsError, RegionError.
    """
    *typed, given = values
    table: dict[str, Any] = {"prompt": "", "regions": regions_of(canvas), **given}
    table |= {key: value for key, value in zip(PLAIN, typed, strict=False) if value not in (None, "")}
    return make_composition({**table, **table_of(more_fields(), typed[len(PLAIN) :])}, "composition")


def parts_of(studio: Studio, composition: Composition) -> list[Any]:
    """The page's parts out of a composition: the other way round."""
    width, height = studio.size_of(composition)
    table = composition.model_dump(mode="json")
    return [
        value_of(composition, (width, height)),
        composition.prompt,
        composition.negative_prompt,
        width,
        height,
        composition.seed,
        composition.num,
        *values_of(more_fields(), table),
        given_of(composition),
    ]


def given_of(composition: Composition) -> dict[str, Any]:
    """What a composition is drawn from beside its prompts and regions, by key."""
    return composition.model_dump(mode="json", include=set(GIVEN), exclude_defaults=True)


def lacking(studio: Studio, composition: Composition, drawn_by: str) -> list[str]:
    """What its regions lack, a line for each."""
    return advice(composition, shelf_of(studio.workspace, drawn_by), studio.workspace.base)


def keep(studio: Studio, composition: Composition, drawn_by: str, by: str = "") -> list[str]:
    """Write down what is on the canvas (by which page) if it is new, and say what its regions lack."""
    if not studio.workspace.holds(composition):
        studio.changes.make(by, lambda: studio.workspace.keep(composition))
    return lacking(studio, composition, drawn_by)


def with_prompts(studio: Studio, composition: Composition, drawn_by: str, scene: str) -> Composition:
    """The composition with its prompts written from the concepts in its boxes."""
    shelf = shelf_of(studio.workspace, drawn_by)
    return completed(composition, shelf, studio.workspace.base, scene.strip())


def start_drawing(studio: Studio, composition: Composition, drawn_by: str) -> Job:
    """A job that draws each of the composition's pictures. Raises SettingsError, TokenError, before anything is written."""
    if composition.num > MOST_AT_ONCE:
        raise SettingsError(f"num: expected at most {MOST_AT_ONCE} at once here, found {composition.num}")
    asked = order(studio.workspace, studio.workspace.canvas, composition, drawn_by)
    check(studio.workspace, asked, composition)
    alone = [
        composition.model_copy(update={"num": 1, "seed": composition.seed + number})
        for number in range(composition.num)
    ]

    def work(job: Job) -> list[Path]:
        return draw(studio.engine, written(studio, [(one, drawn_by) for one in alone]), job)

    return studio.jobs.submit("draw", f"drawing {many(len(alone), 'picture')}", work)


def start_drawing_over(studio: Studio, picture: str, place: int, composition: Composition, drawn_by: str) -> Job:
    """A job that draws one region of a picture in the workspace over, by number, as `mixofshow sample --redo` does.

    Raises SettingsError, RegionError, TokenError.
    """
    if not picture:
        raise SettingsError("which picture? click one in the strip first, then draw its region over")
    file = picture_named(studio, picture)
    return start_drawing(studio, redo_composition(file, place, before=composition), drawn_by)


def written(studio: Studio, wanted: Sequence[tuple[Composition, str]]) -> list[Order]:
    """Each composition in a file of its own, which says above it by which command it is drawn."""
    workspace = studio.workspace

    def how(file: Path, number: int) -> str:
        return command(workspace, order(workspace, file, *wanted[number]))

    files = workspace.new_pictures([one for one, _ in wanted], how)
    return [order(workspace, file, *one) for file, one in zip(files, wanted, strict=True)]


def command_of(picture: Path) -> str:
    """The command that gives the picture's bytes; empty where its file is gone."""
    file = picture.with_suffix(".yaml")
    if not file.is_file():
        return ""
    first = file.read_text("utf-8", errors="replace").partition("\n")[0]  # it may be anybody's
    return first.removeprefix(COMPOSITION) if first.startswith(COMPOSITION) else ""


def drawn_by_of(picture: Path) -> str:
    """By which model a picture of the workspace was drawn, as the page's choice has it."""
    words = command_of(picture).split()
    return Path(words[words.index("--model") + 1]).name if "--model" in words else OWN


def picture_named(studio: Studio, name: str) -> Path:
    """The workspace's picture of that number. Raises SettingsError; no other file can be named."""
    found = {path.stem: path for path in studio.workspace.picture_files()}
    if name not in found:
        raise SettingsError(f"no picture is called '{shown(name)}' any more")
    return found[name]


def picture_captioned(studio: Studio, text: str) -> Path:
    """The workspace's picture with this caption. Raises SettingsError."""
    found = {caption(path): path for path in studio.workspace.picture_files()}
    if text not in found:
        raise SettingsError(f"the picture '{shown(text)}' is not there any more")
    return found[text]


def recalled(workspace: Workspace, path: Path) -> Composition:
    """The composition that a picture carries, from wherever it came; sketches that are not in this workspace are left out.

    Raises SettingsError, BadInputError.
    """
    composition = composition_of(path)
    there = tuple(one for one in composition.controls if is_here(workspace, one))
    if len(there) < len(composition.controls):
        logger.warning("this picture also followed a sketch that is not here; it is left out")
    return composition.model_copy(update={"controls": there})


def caption(path: Path) -> str:
    """What stands under a picture: its number and seed; of one that is not ours, its name."""
    return f"{shown(path.stem)}{_seed(path, changed_at(path))}"


@lru_cache(maxsize=1000)
def _seed(path: Path, changed: int) -> str:
    try:
        return f" · seed {read_note(path)[0].seed}"
    except MixOfShowError:
        return ""  # people put their own pictures there, too


def underlay(path: Path | None, composition: Composition | None = None) -> str:
    """The picture as it lies under the regions; without one, that which is started from."""
    if path is None and composition and composition.image:
        try:
            return shrunk(read_picture(composition.image, "RGB"))
        except MixOfShowError:
            return ""  # drawing says why
    return thumbnail(path) if path else ""
