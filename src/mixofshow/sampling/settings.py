"""What a composition may hold, checked once. Nothing here needs torch, so that the command line can list it at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from mixofshow.concepts.syntax import Syntax
from mixofshow.errors import SettingsError
from mixofshow.tables import Settings

Box = tuple[float, float, float, float]
"""(left, top, right, bottom)."""
Points = tuple[tuple[float, float], ...]
"""(x, y) of each corner of a polygon, in order."""
Units = Literal["px", "share"]
"""Of a region's lengths: pixels, or shares of the picture."""

STEPS: Final = 25
MAX_PIXELS: Final = 2**24
ALSO: Final = {"num_inference_steps": "steps", "strength": "image_strength"}
"""What diffusers' pipelines call some of the settings."""


class Drawing(Settings):
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

    @classmethod
    def known_keys(cls, problem: Mapping[str, Any]) -> Iterable[str]:
        """The keys, and what diffusers calls some of them; in a list, those of its entries."""
        entry = ENTRIES.get(problem["loc"][0]) if len(problem["loc"]) > 1 else None
        return entry.model_fields if entry else [*cls.model_fields, *ALSO]

    @property
    def isolated_steps(self) -> int:
        """In how many of the first steps regions do not read each other."""
        return self.steps if self.isolate is True else int(self.isolate)

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


class RegionEntry(BaseModel):
    """A region as written in YAML; see Region. `mask` is a file beside the YAML, and in here the picture itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    box: Box | None = None
    polygon: Points | None = None
    mask: str | None = None
    negative_prompt: str | None = None
    weight: float = 1.0
    front: int = 0
    first_step: int | None = None
    last_step: int | None = None
    strength: float = 1.0
    concept_from: int | None = None
    feather: float = 0.0
    units: Units | None = None
    adapters: dict[str, float] | None = None


class ControlEntry(BaseModel):
    """A control as written in YAML; see PictureControl.

    `network` is a folder or an embedded name, `picture` a file. `strength_map` is a file beside the YAML, and in here the
    picture itself; instead, `regions` has a strength for each region in turn, and `outside` the one beside them. The
    hashes are found when the composition is made; where they are given, nothing else is taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str
    picture: str
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    strength_map: str | None = None
    regions: tuple[float, ...] = ()
    outside: float = 1.0
    network_hash: str | None = None
    picture_hash: str | None = None


ENTRIES: Final[dict[Any, type[BaseModel]]] = {"regions": RegionEntry, "controls": ControlEntry}
"""What the lists in a composition are made of."""


class Composition(Drawing):
    """Prompts, places, size and seed. Two equal compositions give equal pictures on one machine."""

    prompt: str = Field(description="What the whole picture shows.")
    negative_prompt: str = Field("", description="What it does not show.")
    regions: tuple[RegionEntry, ...] = ()
    controls: tuple[ControlEntry, ...] = ()
    image: str | None = None
    mask: str | None = None
    seed: int = Field(0, description="Of the first picture.")
    num: int = Field(1, ge=1, le=10_000, description="How many pictures; picture k has seed + k.")
    regional_lora: bool = Field(
        False,
        validation_alias=AliasChoices("regional_lora", "own_weights"),
        description="Draw each region by the LoRA of its own concepts alone, un-fused.",
    )

    @property
    def drawing(self) -> dict[str, Any]:
        """The settings that a pipeline takes."""
        return self.model_dump(include=set(Drawing.model_fields))


def make_drawing(table: Mapping[str, Any]) -> Drawing:
    """Checked settings, under our names or diffusers'. Raises SettingsError naming the field and the nearest known one."""
    return Drawing(**{ALSO.get(key, key): value for key, value in table.items()})
