"""What the page asks of a composition: from its parts to a Composition and back, and the job that draws it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from mixofshow.errors import MixOfShowError, SettingsError, shown
from mixofshow.outputs import write_text
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.replay import composition_of, read_note
from mixofshow.sampling.settings import Composition
from mixofshow.studio.advice import advice, completed
from mixofshow.studio.drawing import OWN, Engine, Order, check, command, draw, order, shelf_of
from mixofshow.studio.editor import regions_of, thumbnail, value_of
from mixofshow.studio.forms import Field, fields_of, table_of, values_of
from mixofshow.studio.jobs import Job, Jobs
from mixofshow.studio.workspace import Workspace, as_yaml

logger = logging.getLogger(__name__)

PLAIN: Final = ("prompt", "negative_prompt", "width", "height", "seed", "num")
"""The keys that stand beside the canvas."""
HIDDEN: Final = ("image", "mask", "controls", "redo", "redo_margin")
"""Keys that the page has no place for yet."""
ON_THE_PAGE: Final = (*PLAIN, "regions", "regional_lora", *HIDDEN)
"""Of a composition's keys, those that are not in the form."""
MOST_WAYS: Final = 4
"""Models that a comparison draws by, at most."""
MOST_AT_ONCE: Final = 64
"""Pictures that one click draws, at most."""


@dataclass(frozen=True)
class Studio:
    """All that the tabs share: the workspace, what is at work, the model that drew last, and the base's usual size."""

    workspace: Workspace
    size: tuple[int, int] = (64, 64)
    jobs: Jobs = field(default_factory=Jobs)
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
    """A composition out of the page's parts, checked: the editor's value, those of PLAIN, those of `more_fields`.

    No file is read, whatever names stand in it. Raises SettingsError, RegionError.
    """
    table: dict[str, Any] = {"prompt": "", "regions": regions_of(canvas)}
    table |= {key: value for key, value in zip(PLAIN, values, strict=False) if value not in (None, "")}
    return make_composition({**table, **table_of(more_fields(), values[len(PLAIN) :])}, "composition")


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
    ]


def lacking(studio: Studio, composition: Composition, drawn_by: str) -> list[str]:
    """What its regions lack, a line for each."""
    return advice(composition, shelf_of(studio.workspace, drawn_by), studio.workspace.base)


def keep(studio: Studio, composition: Composition, drawn_by: str) -> list[str]:
    """Write down what is on the canvas, and say what its regions lack."""
    studio.workspace.keep(composition)
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
    orders = written(studio, [(one, drawn_by) for one in alone])
    title = f"drawing {len(orders)} pictures" if len(orders) > 1 else f"drawing picture {orders[0].file.stem}"
    return studio.jobs.submit("draw", title, lambda job: draw(studio.engine, orders, job))


def start_comparing(studio: Studio, composition: Composition, drawn_by: str) -> Job:
    """A job that draws the first picture in every way there is, on one seed: as it is, by other models, without regions.

    Raises SettingsError, TokenError where not even the way that was chosen can draw it.
    """
    alone = composition.model_copy(update={"num": 1})
    check(studio.workspace, order(studio.workspace, studio.workspace.canvas, alone, drawn_by), alone)
    ways = [drawn_by, *(way for way in (OWN, *studio.workspace.model_names()) if way != drawn_by)][:MOST_WAYS]
    plain = alone.model_copy(update={"regions": ()})
    wanted = [(f"by {way}", alone, way) for way in ways]
    wanted += [(f"without regions, by {way}", plain, way) for way in ways if alone.regions]
    possible = [one for one in wanted if _can_draw(studio, one[1], one[2])]
    orders = written(studio, [(one, way) for _, one, way in possible])
    labels = [label for label, _, _ in possible]

    def work(job: Job) -> list[Path]:
        job.facts = list(zip((one.target for one in orders), labels, strict=True))
        return draw(studio.engine, orders, job)

    return studio.jobs.submit("draw", f"drawing {len(orders)} ways to compare", work)


def _can_draw(studio: Studio, composition: Composition, way: str) -> bool:
    """Whether this way knows all words, and has any concept to draw."""
    try:
        asked = order(studio.workspace, studio.workspace.canvas, composition, way)
        check(studio.workspace, asked, composition)
    except MixOfShowError:
        return False
    return bool(asked.model or asked.concepts)


def written(studio: Studio, wanted: Sequence[tuple[Composition, str]]) -> list[Order]:
    """Each composition in a file of its own, which says above it by which command it is drawn."""
    files = studio.workspace.new_pictures([one for one, _ in wanted])
    orders = [order(studio.workspace, file, *one) for file, one in zip(files, wanted, strict=True)]
    for one, (composition, _) in zip(orders, wanted, strict=True):
        write_text(one.file, f"# {command(studio.workspace, one)}\n{as_yaml(composition)}")
    return orders


def command_of(picture: Path) -> str:
    """The command that gives the picture's bytes; empty where its file is gone."""
    file = picture.with_suffix(".yaml")
    if not file.is_file():
        return ""
    first = file.read_text("utf-8").partition("\n")[0]
    return first.removeprefix("# ") if first.startswith("# mixofshow ") else ""


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


def recalled(path: Path) -> Composition:
    """The composition that a picture carries, from wherever it came; what of it the page cannot show is said.

    Raises SettingsError, BadInputError.
    """
    composition = composition_of(path)
    usual = Composition(prompt="")
    if left := [key for key in HIDDEN if getattr(composition, key) != getattr(usual, key)]:
        logger.warning("this picture was also made from %s, which the page leaves out", ", ".join(left))
    return composition.model_copy(update={key: getattr(usual, key) for key in left})


def caption(path: Path) -> str:
    """What stands under a picture: its number and seed."""
    return f"{path.stem} · seed {_seed(path, path.stat().st_mtime_ns)}"


@cache
def _seed(path: Path, changed: int) -> int:
    return read_note(path)[0].seed


def underlay(path: Path | None) -> str:
    """The picture as it lies under the regions."""
    return thumbnail(path) if path else ""
