"""How concepts are fused: one frozen table, checked once when made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from mixofshow.errors import SettingsError, shown
from mixofshow.tables import Settings

USUAL: Final = "gradient"
DAMPING: Final = (USUAL, "contrastive")
"""Methods that fit outputs under a ridge."""
PAPER: Final[dict[str, Any]] = {
    "prompts": ("photo of a {}", "{}"),
    "picture_prompts": ("photo of a {}",),
    "weights": "equal",
    "guard": False,
}
"""How the paper fuses (Mix-of-Show §4.1)."""
PROMPTS: Final = ("photo of a {}", "{}", "a photo of a {} on a red background", "a {} on a blue background")
PICTURE_PROMPTS: Final = (PROMPTS[0], *PROMPTS[2:])
"""More than the paper's, so that what is kept is the concept and not one picture of it (docs/how-it-works.md)."""
DAMPED: Final = 1e-3
"""The ridge from which on products in single precision move a change by less than .3 %."""
ConceptWeight = Annotated[float, Field(gt=0, le=1e6)]


def parse_weights(value: Any) -> Any:
    """Weights as typed on a command line, "name=2,other=0.5", as a table; all else is left as it is."""
    if not isinstance(value, str) or "=" not in value:
        return value
    pairs = (pair.partition("=") for pair in value.split(","))
    return {name.strip(): weight.strip() for name, _, weight in pairs}


Weights = Annotated[
    Annotated[Literal["equal", "energy"], Tag("word")] | Annotated[dict[str, ConceptWeight], Tag("table")],
    # So that an error tells of the one that was meant.
    Discriminator(lambda value: "table" if isinstance(value, Mapping) else "word"),
    BeforeValidator(parse_weights),
]


class RecordingSettings(Settings):
    """What a concept reads and draws while it is recorded. Prompts aside, the defaults are the paper's (Mix-of-Show §4.1)."""

    prompts: tuple[str, ...] = Field(PROMPTS, min_length=1, description="What the text side reads; {} is the concept.")
    picture_prompts: tuple[str, ...] = Field(
        PICTURE_PROMPTS, min_length=1, description="What is drawn, a picture each."
    )
    steps: int = Field(20, ge=1, le=1000, description="Sampling steps of each picture; every one is recorded.")
    seed: int = Field(1234, ge=0, lt=2**63, description="Of the first picture's noise; picture k has seed + k.")
    guidance_scale: float = Field(
        1.0, ge=1, le=100, description="Above 1 pictures are drawn with guidance, and its empty prompt is recorded too."
    )

    def recording(self) -> dict[str, Any]:
        """All that decides what a recording holds."""
        return self.model_dump(mode="json", include=set(RecordingSettings.model_fields))


class FusionSettings(RecordingSettings):
    """How concepts are fused."""

    former: ClassVar[Mapping[str, str | None]] = {"refine_order": None}

    method: str = Field(USUAL, description="gradient, average, or another of docs/how-it-works.md.")
    options: Mapping[str, Any] = Field(
        default_factory=dict, description="The method's own settings; picture.ridge=0.1 is for one stage only."
    )
    mode: Literal["staged", "independent"] = Field(
        "staged",
        description="Staged: text encoder, then keys and values behind the fused one, then the rest behind both, as in "
        "the paper. Independent: each concept's whole own model, so that recordings can be kept and added up.",
    )
    weights: Weights | None = Field(
        None,
        description="How much concepts count: equal; energy: in each layer as 1 / ‖ΔW_i X_i‖², or if that is little as "
        "1 / ‖0.25 W0 X_i‖²; or by name, as cat=2,dog=0.5, and in one kind of layer alone (text, keys-and-values, picture), as "
        "dog.picture=3. Default: energy for gradient and contrastive fusion, equal for the others.",
    )
    prior: float = Field(0.0, ge=0, le=1e6, description="How much the base's own prompts count, against a concept's 1.")
    prior_prompts: tuple[str, ...] = Field(("", "a photo"), min_length=1, description="What they are.")
    refine: int = Field(
        0, ge=0, le=100, description="Passes that solve all layers again, for what they see in the fused model."
    )
    refit: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Steps for each concept in which the fused weights and all words then learn to make up for what "
        "fusing has lost.",
    )
    guard: bool = Field(
        True, description="Turn down concepts that are far louder than the others or undo another, and name them."
    )
    refuse_loud: bool = Field(False, description="End with an error that names them instead.")
    measure: bool = Field(
        False, description="Record and report what is left undone also where the method itself records nothing."
    )
    leave_one_out: bool = Field(False, description="Also report how much each concept costs the others.")
    max_memory: float | None = Field(
        None,
        gt=0,
        description="Gigabytes for what stages and refinement record at a time; less means more passes, with equal "
        "results. Default: 3 on a GPU, on the CPU what it takes.",
    )

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        """Raises SettingsError. The table of methods needs torch, so that the usual one is not looked up."""
        if method != USUAL:
            from mixofshow.fusion.methods import require_known

            require_known(method)
        return method

    @property
    def exact(self) -> bool:
        """Whether moments must be exact to the last digit: where no ridge damps them, or later fusions use them too."""
        ridges = [float(value) for name, value in self.options.items() if name.rpartition(".")[2] == "ridge"]
        return self.mode == "independent" or self.method not in DAMPING or min(ridges, default=1.0) < DAMPED

    @property
    def counting(self) -> Literal["equal", "energy"] | dict[str, float]:
        """The weights, as given or as they suit the method."""
        return self.weights or ("energy" if self.method in DAMPING else "equal")


def asked(settings: FusionSettings | None, keys: Mapping[str, Any]) -> FusionSettings:
    """The settings of a call: made before, or its keys. Raises SettingsError for both at once."""
    if settings is None:
        return FusionSettings.of(keys, "fuse")
    if not isinstance(settings, FusionSettings):
        raise SettingsError(
            f"fuse: expected FusionSettings, found {shown(settings)}; keys may stand in the call itself"
        )
    if keys:
        raise SettingsError(f"fuse: {', '.join(keys)} beside settings that are made; say it in one of both")
    return settings


def on_top(settings: FusionSettings, given: Mapping[str, Any]) -> FusionSettings:
    """The settings with given ones on top; a method's options stay as long as the method does. Raises SettingsError."""
    kept = settings.options if given.get("method", settings.method) == settings.method else {}
    options = {**kept, **given.get("options", {})}
    return FusionSettings.of({**settings.model_dump(), **given, "options": options}, "options")
