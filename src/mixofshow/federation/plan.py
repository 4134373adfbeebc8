"""What a round does: one frozen table, which people write as YAML."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

from pydantic import Field, field_validator, model_validator

from mixofshow.errors import SettingsError, listed, shown
from mixofshow.fusion.settings import FusionSettings, RecordingSettings
from mixofshow.reading import read_table
from mixofshow.tables import Settings
from mixofshow.tuning.settings import make_settings, nested

SECURE: Final[dict[str, Any]] = {
    **{"method": "gradient", "mode": "independent", "weights": "equal"},
    **{"guard": False, "refine": 0, "refit": 0, "prior": 0},
}
"""What fusing from sums means."""
SUMMED: Final = {"options", *RecordingSettings.model_fields}
"""What may be chosen beside it."""
LONGEST: Final = 365 * 86_400.0
NOT_FOR_CENTERS: Final = {
    *("name", "class_word", "data", "masks", "base", "license", "author", "skip_bad", "tracker", "instance_prompt"),
    *("prior.data", "preview_every"),
}
"""Settings of tuning that are the client's own: what it is about, and all that names files."""


class Plan(Settings):
    """A round of a federation."""

    wait: float = Field(
        600, gt=0, le=LONGEST, description="Seconds that clients have to come, and to come back when they went away."
    )
    patience: float = Field(
        43_200, gt=0, le=LONGEST, description="Seconds for one step: tuning, or their owners' approval."
    )
    expect: tuple[str, ...] = Field((), description="Members to wait for, by name; without any, those who are there.")
    least: int = Field(1, ge=1, description="With fewer members than that nothing is fused.")
    remove: tuple[str, ...] = Field((), description="Members whose concepts no longer belong to the model.")
    moments: bool = Field(False, description="Clients record their concepts themselves, so that the center need not.")
    judge: bool = Field(False, description="Clients judge the fused model on pictures of their own; numbers only.")
    secure: bool = Field(False, description="The center gets sums over clients only (see docs/federation.md).")
    tune: dict[str, Any] = Field(default_factory=dict, description="Settings of tuning, for clients that tune.")
    fuse: dict[str, Any] = Field(default_factory=dict, description="Settings of fusion.")

    @field_validator("tune")
    @classmethod
    def _tunes(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Raises SettingsError."""
        return tunable(given)

    @model_validator(mode="after")
    def _fuses(self) -> Self:
        """Raises SettingsError."""
        if self.secure:
            chosen = {key: value for key, value in self.fuse.items() if key not in SUMMED}
            if wrong := [f"{key}: {shown(value)}" for key, value in chosen.items() if value != SECURE.get(key)]:
                raise SettingsError(f"fuse: {listed(wrong)}: cannot be had of sums alone; leave it out, or secure")
            if self.moments or self.remove:
                raise SettingsError("secure: keeps no member's concept, so that there are no moments, and none to remove")
        _ = self.fusion
        return self

    @property
    def fusion(self) -> FusionSettings:
        """How the center fuses."""
        return FusionSettings.of({**self.fuse, **(SECURE if self.secure else {})}, "fuse")


def tunable(given: Any) -> dict[str, Any]:
    """A center's settings of tuning, nested, with nothing in them that is the client's own. Raises SettingsError."""
    table = nested(given if isinstance(given, dict) else {})
    if own := sorted(NOT_FOR_CENTERS & set(_dotted(table))):
        raise SettingsError(f"tune: {', '.join(own)}: for each client to say, not for the center")
    make_settings({"name": "a", "class_word": "a", "data": ".", **table}, "tune")
    return table


def _dotted(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def read_plan(path: Path) -> Plan:
    """A plan from its file. Raises SettingsError."""
    return Plan.of(read_table(path), str(path))
