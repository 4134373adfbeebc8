"""Tables of settings: frozen, checked once when made, whoever makes them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import CoreSchema, core_schema

from mixofshow.errors import SettingsError, field_problem, listed, shown
from mixofshow.reading import MAX_NUMBER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Named:
    """Of a text in a table: it names a concept. What is none is told in words, not by a pattern."""

    longest: int

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> CoreSchema:
        return core_schema.custom_error_schema(
            core_schema.str_schema(pattern=rf"^[a-z0-9][a-z0-9_-]{{0,{self.longest - 1}}}$"),
            "name",
            custom_error_message=f"expected at most {self.longest} of a-z, 0-9, _ and -, of which the first is a letter or digit",
        )


class Group(BaseModel):
    """A frozen table that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(Group):
    """A table of settings. Made from keyword arguments, or by `of`; raises SettingsError naming field and nearest key."""

    former: ClassVar[Mapping[str, str | None]] = {}
    """What settings were called before, and are called now; None: nothing depends on them any more."""

    def __init__(self, /, **values: Any) -> None:
        for key, number in _whole_numbers(values, ""):
            if abs(number) >= MAX_NUMBER:  # which no reader of ours would take back from a file
                raise SettingsError(f"'{key}': expected a number below 2^63, found {shown(number, 40)}")
        try:
            super().__init__(**self.renamed(values))
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
    def renamed(cls, table: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
        """The table with the names of now for those of before, which is said, unless `quiet`. Raises SettingsError."""
        named = {key: value for key, value in table.items() if key not in cls.former}
        for old in (key for key in table if key in cls.former):
            now = cls.former[old]
            if now is not None:
                if now in named:
                    raise SettingsError(f"'{old}': is called '{now}' now, which is there too; say it once")
                named[now] = table[old]
            if not quiet:
                logger.warning("`%s`: %s", old, f"is called `{now}` now" if now else "does nothing any more; leave it out")
        return named

    @classmethod
    def known_keys(cls, problem: Mapping[str, Any]) -> Iterable[str]:
        """The keys that may stand where there is a problem, of which the nearest is named."""
        return cls.model_fields


def _whole_numbers(value: Any, key: str) -> Iterator[tuple[str, int]]:
    """All whole numbers in a table, by dotted keys."""
    if isinstance(value, int):
        yield key, value
    elif isinstance(value, Mapping | list | tuple):
        for name, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _whole_numbers(one, f"{key}.{name}" if key else str(name))
