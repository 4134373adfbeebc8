"""Tables of settings: frozen, checked once when made, whoever makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mixofshow.errors import SettingsError, field_problem, listed, shown


class Group(BaseModel):
    """A frozen table that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(Group):
    """A table of settings. Made from keyword arguments, or by `of`; raises SettingsError naming field and nearest key."""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = [field_problem(one, self.known_keys(one)) for one in error.errors()]
            raise SettingsError(listed(problems)) from error

    @classmethod
    def of(cls, table: Any, source: str = "settings") -> Self:
        """From a table, which may be a stranger's; `source` stands in front of what is wrong. Raises SettingsError."""
        if not isinstance(table, Mapping):
            raise SettingsError(f"{source}: expected a table of settings, found {shown(table)}")
        try:
            return cls(**{str(key): value for key, value in table.items()})
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from error

    @classmethod
    def known_keys(cls, problem: Mapping[str, Any]) -> Iterable[str]:
        """The keys that may stand where there is a problem, of which the nearest is named."""
        return cls.model_fields
