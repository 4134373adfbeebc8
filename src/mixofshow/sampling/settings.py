"""What a composition may hold, checked once. Nothing here needs torch, so that the command line can list it at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    FiniteFloat,
    SkipValidation,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from mixofshow.concepts.syntax import Syntax
from mixofshow.errors import RegionError, SettingsError, field_problem, shown
from mixofshow.sampling.pictures import PictureSource, read_picture
from mixofshow.tables import Group, Settings

Box = tuple[float, float, float, float]
"""(left, top, right, bottom)."""
Points = tuple[tuple[float, float], ...]
"""(x, y) of each corner of a polygon, in order."""
Units = Literal["px", "share"]
"""Of a region's lengths: pixels, or shares of the picture."""

Step = Annotated[int, Field(ge=1)]
"""A step, counted from 1."""
MAX_STRENGTH: Final = 10.0
ControlStrength = Annotated[float, Field(ge=0, le=MAX_STRENGTH)]
"""Of a control."""
AdapterStrength = Annotated[FiniteFloat, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
"""Of a LoRA in a region; below 0 it draws the contrary."""

STEPS: Final = 25
AUTO: Final = "auto"
"""In the place of regions, or among them: the concepts that no region names are given places that are found."""
MAX_PIXELS: Final = 2**24
MAX_WEIGHT: Final = 1e6
_REGION: Final = re.compile(r"\s*([^:]*?)\s*:\s*(.*)", re.DOTALL)
FINDING: Final = ("first_pass", "smallest_place", "largest_place")
"""Settings of how places are found."""
ALSO: Final = {"num_inference_steps": "steps", "strength": "image_strength"}
"""What diffusers' pipelines call some of the settings."""


class SamplingSettings(Settings):
    """Size, steps, guidance, and what is done beside them."""

    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    steps: int = Field(STEPS, ge=1, le=1000, description="Steps of denoising.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Default: what suits the base.")
    guidance_rescale: float = Field(0, ge=0, le=1, description="Against overexposure at high guidance (Lin et al.).")
    clip_skip: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Last layers of the text encoders to leave out, as in diffusers; default: the base's.",
    )
    prompt_syntax: Syntax = Field(
        "plain",
        description="How prompts are read: a1111 knows weights such as (word:1.3); plain has no marks.",
    )
    image_strength: float = Field(0.8, gt=0, le=1, description="How far to go from the picture to start from.")
    upscale: float = Field(1, ge=1, le=8, description="Then enlarge the picture and draw it over again.")
    upscale_strength: float = Field(0.5, gt=0, le=1, description="How far to go from the enlarged picture.")
    isolate: int | bool = Field(
        False, ge=0, description="Regions do not read each other in self-attention: true, or for so many first steps."
    )
    attend: float = Field(0, ge=0, le=1, description="Move latents toward a region's missing subject, by this rate.")
    first_pass: float = Field(
        0.1, gt=0, lt=1, description="With regions auto: the share of the steps after which places are found."
    )
    smallest_place: float = Field(0.06, gt=0, lt=1, description="With regions auto: share of the picture.")
    largest_place: float = Field(0.3, gt=0, le=1, description="With regions auto: share of the picture.")

    @classmethod
    def known_keys(cls, problem: Mapping[str, Any]) -> Iterable[str]:
        """The keys, and what diffusers calls some of them; in a list, those of its entries."""
        keys = [*cls.model_fields, *ALSO]
        return ENTRIES.get(problem["loc"][0], keys) if len(problem["loc"]) > 1 else keys

    @property
    def changed(self) -> set[str]:
        """The settings that are not at their defaults."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    @property
    def isolated_steps(self) -> int:
        """In how many of the first steps regions do not read each other."""
        return self.steps if self.isolate is True else int(self.isolate)

    def steps_done(self, *, from_image: bool) -> tuple[int, int]:
        """The first and last step that are done, from 1: those from a picture begin later."""
        share = self.image_strength if from_image else 1.0
        return min(self.steps - min(int(self.steps * share), self.steps) + 1, self.steps), self.steps

    def require_possible(self, *, from_image: bool, masked: bool, called: str = "image_strength") -> None:
        """Raise SettingsError for settings that exclude each other, and where a strength leaves no step to be done.

        The first of the strengths is `called` so.
        """
        passes = {called: from_image and self.image_strength, "upscale_strength": self.upscale > 1 and self.upscale_strength}
        for name, share in passes.items():
            if share and int(self.steps * share) < 1:
                least = f"at least 1 of {self.steps} steps, {1 / self.steps:.2g}"
                raise SettingsError(f"`{name}`: expected {least}, found {share:g}")
        if self.attend and self.steps < 3:
            raise SettingsError(f"`attend`: expected 0 with fewer than 3 steps, found {self.attend:g}")
        if masked and self.upscale != 1:
            raise SettingsError(f"`upscale`: expected 1 with a mask, found {self.upscale:g}")

    def require_sizes(self) -> None:
        """Raise SettingsError unless a place that is found can have a size."""
        if self.smallest_place > self.largest_place:
            largest = f"at most `largest_place`, {self.largest_place:g}"
            raise SettingsError(f"`smallest_place`: expected {largest}, found {self.smallest_place:g}")

    def size(self, pipeline: Any, image: Any = None) -> tuple[int, int]:
        """(width, height): as given, else those of the picture to start from, else the base's. Raises SettingsError."""
        factor = pipeline.vae_scale_factor
        usual = (pipeline.unet.config.sample_size * factor,) * 2
        if image is not None:
            usual = tuple(max(factor, side // factor * factor) for side in image.size)
        width, height = self.width or usual[0], self.height or usual[1]
        for name, value in (("width", width), ("height", height)):
            legal = max(factor, round(value / factor) * factor)
            if value % factor or width * height > MAX_PIXELS:
                raise SettingsError(
                    f"{name}: expected a multiple of {factor} such as {legal}, at most {MAX_PIXELS} pixels in all, "
                    f"found {value}"
                )
        return width, height

    def enlarged(self, pipeline: Any, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the second pass, the nearest that the pipeline can draw. Raises SettingsError."""
        factor = pipeline.vae_scale_factor
        wide, high = (max(factor, round(side * self.upscale / factor) * factor) for side in (width, height))
        if wide * high > MAX_PIXELS:
            raise SettingsError(f"upscale: {self.upscale} gives {wide} x {high}, over {MAX_PIXELS} pixels")
        return wide, high


@dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Region:
    """A part of the picture with a prompt of its own: a box, a polygon, or a mask picture (white is inside).

    `units` says what the box, polygon and feather are in: "px", or "share" of the picture (a feather: of its shorter
    side). None is pixels, unless no number of the box or polygon is over 1, and for a feather, unless it is at most 1. A
    mask is stretched over the whole picture; grey is partly inside. `negative_prompt` None means the one of the whole
    picture. Where regions overlap, the one with the largest `front` hides the others; of those in one depth each counts by
    its `weight`. `first_step` and `last_step` count from 1 and are included; None is the first or last there is.
    `strength` 0 to 1 is how much of the prompt's concepts is there (0: only their class words), and before
    `concept_from`, a step, none of it is. `feather` is the width over which the region fades in, half of it on either
    side of its edge. `adapters` are the LoRAs by which it is drawn, concepts by name or those that were loaded as
    adapters, and how much of each; None: with `regional_lora`, the concepts in its prompt. An `auto` region has no place yet:
    that of the one concept in its prompt, which the whole picture's prompt names too, is found while it is drawn.
    """

    prompt: str
    box: Box | None = None
    negative_prompt: str | None = None
    _: KW_ONLY
    polygon: Points | None = None
    mask: SkipValidation[PictureSource | None] = None
    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)] = 1.0
    front: int = 0
    first_step: Step | None = None
    last_step: Step | None = None
    strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    concept_from: Step | None = None
    feather: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    units: Units | None = None
    adapters: Mapping[str, AdapterStrength] | None = None
    auto: bool = False

    @model_validator(mode="wrap")
    @classmethod
    def _named(cls, given: Any, make: Callable[[Any], Self]) -> Self:
        """Problems of a region that is made by itself are RegionErrors; in a composition they are the composition's."""
        try:
            return make(given)
        except ValidationError as error:
            if not isinstance(given, ArgsKwargs):
                raise
            prompt = next(iter(given.args), (given.kwargs or {}).get("prompt"))
            first, fields = error.errors()[0], list(cls.__dataclass_fields__)
            head, *inside = first["loc"]
            first["loc"] = (fields[head] if isinstance(head, int) else head, *inside)
            if isinstance(first["input"], ArgsKwargs):
                first["input"] = first["input"].kwargs or {}
            problem = field_problem(first, fields)
            raise RegionError(f"region of '{shown(prompt, 40)}': {problem}") from error

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.box, self.polygon, self.mask)) + self.auto != 1:
            raise RegionError(f"{self.title}: expected a box, a polygon or a mask, or auto, and only one of them")
        if not isinstance(self.mask, PictureSource | None):
            found = type(self.mask).__name__
            raise RegionError(f"{self.title}: mask: expected a picture (PIL.Image.Image) or a file, found {found}")
        ends = self.last_step is None or (self.first_step or 1) <= self.last_step
        self._require(ends, "last_step", f"at least first_step, {self.first_step}")

    def in_shares(self, largest: float) -> bool:
        """Whether numbers of which this is the largest are shares of the picture, not pixels."""
        return largest <= 1 if self.units is None else self.units == "share"

    def require_its_steps(self, first: int, last: int) -> None:
        """Raise RegionError unless the region is there in a step that is done, and its concept may begin in one."""
        expected = f"a step from {first} to {last}, which are done"
        self._require((self.first_step or 1) <= last, "first_step", expected)
        self._require(self.last_step is None or self.last_step >= first, "last_step", expected)
        self._require((self.concept_from or 1) <= last, "concept_from", expected)

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise RegionError(f"{self.title}: {name}: expected {expected}, found {getattr(self, name)}")

    @property
    def title(self) -> str:
        """What messages call it."""
        kinds = {"polygon": self.polygon is not None, "mask": self.mask is not None, AUTO: self.auto}
        place = point(self.box) if self.box is not None else next((kind for kind, holds in kinds.items() if holds), "without place")
        return f"region {place} of '{shown(self.prompt, 40)}'"

    @classmethod
    def parse(cls, text: str) -> Region:
        """From "left,top,right,bottom: prompt", or "auto: prompt". Raises RegionError."""
        match = _REGION.fullmatch(text)
        if match and match[1] == AUTO:
            return cls(match[2], auto=True)
        numbers = match.group(1).split(",") if match else []
        try:
            left, top, right, bottom = (float(number) for number in numbers)
        except ValueError as error:
            raise RegionError(f"region '{shown(text)}': expected \"left,top,right,bottom: prompt\"") from error
        return cls(match.group(2) if match else "", (left, top, right, bottom))


def without_auto(regions: Any) -> tuple[Any, bool]:
    """Regions without the word `auto`, and whether it stood there."""
    if isinstance(regions, str):
        return ((), True) if regions == AUTO else (regions, False)
    if not isinstance(regions, list | tuple):
        return regions, False
    rest = tuple(one for one in regions if not (isinstance(one, str) and one == AUTO))
    return (rest, True) if len(rest) < len(regions) else (regions, False)


def point(numbers: Iterable[float]) -> str:
    """Numbers as messages show them: 8 is 8, not 8.0."""
    return f"({', '.join(f'{number:g}' for number in numbers)})"


class ControlEntry(Group):
    """A control as written in YAML; see PictureControl.

    `network` is a folder or an embedded name, `picture` a file. `strength_map` is a file beside the YAML, and in here the
    picture itself; instead, `regions` has a strength for each region in turn, and `outside` the one beside them. The
    hashes are found when the composition is made; where they are given, nothing else is taken.
    """

    network: str
    picture: str
    strength: ControlStrength = 1.0
    start: float = 0.0
    end: float = 1.0
    strength_map: str | None = None
    regions: tuple[ControlStrength, ...] = ()
    outside: ControlStrength = 1.0
    network_hash: str | None = None
    picture_hash: str | None = None


ENTRIES: Final[dict[Any, Iterable[str]]] = {
    "regions": Region.__dataclass_fields__,
    "redo": Region.__dataclass_fields__,
    "controls": ControlEntry.model_fields,
}
"""The keys of what the lists in a composition are made of."""


class Composition(SamplingSettings):
    """Prompts, places, size and seed. Two equal compositions give equal pictures on one machine.

    With `redo`, a place, nothing but that is drawn, over what `image` shows there; see inset.py.
    """

    former: ClassVar[Mapping[str, str | None]] = {"own_weights": "regional_lora"}

    prompt: str = Field(description="What the whole picture shows.")
    negative_prompt: str = Field("", description="What it does not show.")
    regions: tuple[Region, ...] = ()
    auto: bool = Field(False, description="Find places for the concepts in the prompt that no region names.")
    controls: tuple[ControlEntry, ...] = ()
    image: str | None = None
    mask: str | None = None
    redo: Region | None = None
    redo_margin: float = Field(
        0.25, ge=0, le=8, description="Beside a place that is redone, drawn with it: a share of its longer side."
    )
    seed: int = Field(0, ge=0, description="Of the first picture.")
    num: int = Field(1, ge=1, le=10_000, description="How many pictures; picture k has seed + k.")
    regional_lora: bool = Field(
        False,
        description="Draw each region by the LoRA of its own concepts alone, un-fused.",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_auto(cls, table: Any) -> Any:
        """`regions: auto`, or an entry `auto` in their list, is said by a key of its own."""
        if not isinstance(table, Mapping):
            return table
        regions, auto = without_auto(table.get("regions", ()))
        return {**table, "regions": regions, "auto": True} if auto else table

    @model_validator(mode="after")
    def _masks_an_image(self) -> Self:
        if self.mask is not None and self.image is None:
            raise SettingsError("`mask`: expected `image` beside it, of which it keeps what is black")
        return self

    def require_drawable(self) -> None:
        """Raise SettingsError for what no base can draw. The mask, if any, is the picture itself."""
        self.require_possible(from_image=self.image is not None, masked=self.mask is not None)
        if self.mask and read_picture(self.mask, "L").getbbox() is None:
            raise SettingsError("`mask`: expected white where the picture is drawn anew, found black everywhere")
        if self.auto or any(region.auto for region in self.regions):
            self.require_sizes()

    @property
    def texts(self) -> list[str]:
        """The prompts that are read: where one place is redone, only that one's."""
        places = self.regions if self.redo is None else (self.redo,)
        whole = [self.prompt] if self.redo is None else []
        own = [text for one in places for text in (one.prompt, one.negative_prompt)]
        return [text for text in (*whole, self.negative_prompt, *own) if text]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a pipeline takes."""
        return self.model_dump(include=set(SamplingSettings.model_fields))
