"""How concepts are fused: one frozen table, checked once when made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixofshow.errors import SettingsError, field_problem

PROMPTS: Final = ("photo of a {}", "{}")
Positive = Annotated[float, Field(gt=0, le=1e6)]


class RecordingSettings(BaseModel):
    """What a concept draws while it is recorded. The defaults are the reference's (Mix-of-Show §4.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompts: tuple[str, ...] = Field(PROMPTS, min_length=1, description="What the text side reads; {} is the concept.")
    picture_prompts: tuple[str, ...] = Field(PROMPTS[:1], min_length=1, description="What is drawn, a picture each.")
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

    method: str = Field("gradient", description="One of the functions in fusion/methods.py.")
    options: Mapping[str, Any] = Field(
        default_factory=dict, description="The method's own settings; picture.ridge=0.1 is for one stage only."
    )
    mode: Literal["staged", "independent"] = Field(
        "staged",
        description="Staged: text encoder, then keys and values behind the fused one, then the rest behind both, as in "
        "the paper. Independent: each concept's whole own model, so that recordings can be kept and added up.",
    )
    weights: Literal["equal", "energy"] | dict[str, Positive] = Field(
        "equal", description="How much concepts count: equally, as 1 / ‖ΔW_i X_i‖² in each layer, or by name."
    )
    prior: float = Field(0.0, ge=0, le=1e6, description="How much the base's own prompts count, against a concept's 1.")
    prior_prompts: tuple[str, ...] = Field(("", "a photo"), min_length=1, description="What they are.")
    refine: int = Field(0, ge=0, le=100, description="Passes that correct for what fused layers hand to later ones.")
    refine_order: Literal["stages", "all"] = Field("stages", description="Stage after stage, or all layers at once.")
    guard: bool = Field(False, description="Turn down concepts that are far louder than the others.")
    leave_one_out: bool = Field(False, description="Also report how much each concept costs the others.")
    max_memory: float | None = Field(
        None, gt=0, description="Gigabytes for what is being recorded; less means more passes, with equal results."
    )


def make_fusion_settings(table: Mapping[str, Any], source: str = "settings") -> FusionSettings:
    """Settings from a table. Raises SettingsError that names the field."""
    try:
        return FusionSettings.model_validate(dict(table))
    except ValidationError as error:
        raise SettingsError(f"{source}: {field_problem(error.errors()[0], FusionSettings.model_fields)}") from error
