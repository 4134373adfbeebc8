"""How a concept is tuned: one frozen table, checked once when made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixofshow.errors import SettingsError, nearest, shown


class TuningSettings(BaseModel):
    """Settings of one concept. The defaults are the reference's for Stable Diffusion 1.x (DESIGN of the paper, §4.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$", description="The concept; prompts call it <name>.")
    class_word: str = Field(max_length=64, description="An ordinary word for what it is; the second word starts as it.")
    data: Path = Field(description="Folder of pictures, each with a caption beside it in a .txt of the same name.")
    base: str = Field("emojiland", description="Embedded base, diffusers folder, or hub id in the local cache.")
    instance_prompt: str | None = Field(
        None, description="Caption of pictures that have none; default: a photo of a <name>."
    )
    skip_bad: bool = Field(False, description="Leave out pictures that cannot be read instead of stopping.")

    method: Literal["ed-lora"] = "ed-lora"
    steps: int = Field(1000, ge=1, le=1_000_000)
    batch_size: int = Field(4, ge=1, le=1024)
    rank: int = Field(4, ge=1, le=256, description="Rank of the LoRA in text encoder and UNet.")
    alpha: float = Field(1.0, gt=0, le=100, description="Scale of the LoRA: W0 + alpha · up · down (not alpha / rank).")
    embedding_rate: float = Field(1e-3, gt=0, le=1, description="Learning rate of the words' vectors.")
    text_encoder_rate: float = Field(1e-5, ge=0, le=1)
    unet_rate: float = Field(1e-4, ge=0, le=1)
    random_sigma: float = Field(0.013, ge=0, le=10, description="Spread of the first word's random start.")
    norm_limit: float = Field(0.55, gt=0, description="The words stop moving once their mean length reaches this.")
    noise_offset: float = Field(0.01, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    preview_every: int = Field(0, ge=0, description="Steps between preview grids; 0 for none.")
    seed: int = 0

    license: str | None = None
    author: str | None = None

    @property
    def placeholder(self) -> str:
        """How prompts call the concept."""
        return f"<{self.name}>"

    @property
    def words(self) -> tuple[str, str]:
        """The two words behind the placeholder, V_rand and V_class (paper §3.2)."""
        return f"<{self.name}1>", f"<{self.name}2>"

    def for_file(self) -> dict[str, bool | int | float | str | None]:
        """The settings that may stand in a concept file: how it was trained, nothing about where or by whom."""
        private = {
            "name",
            "class_word",
            "data",
            "base",
            "instance_prompt",
            "skip_bad",
            "license",
            "author",
            "preview_every",
        }
        return self.model_dump(mode="json", exclude=private)


PRESETS: Final[dict[str, dict[str, Any]]] = {
    # A small model with large token vectors learns with larger steps.
    "emojiland": {
        "steps": 400,
        "batch_size": 4,
        "embedding_rate": 1e-2,
        "text_encoder_rate": 3e-4,
        "unet_rate": 3e-3,
        "random_sigma": 0.05,
        "norm_limit": 100.0,
        "noise_offset": 0.0,
    },
}
"""What other bases need instead of the defaults."""


def make_settings(table: Mapping[str, Any], source: str = "settings") -> TuningSettings:
    """Settings from a table, on top of the base's preset. Raises SettingsError naming the field and the nearest one."""
    preset = PRESETS.get(str(table.get("base", "emojiland")), {})
    try:
        return TuningSettings.model_validate({**preset, **table})
    except ValidationError as error:
        raise SettingsError(f"{source}: {'; '.join(_problem(one) for one in error.errors())}") from error


def _problem(error: Any) -> str:
    field = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key '{shown(field)}'{nearest(field, TuningSettings.model_fields)}"
    return f"'{shown(field)}': {error['msg'].lower()}, found {shown(error.get('input'))}"
