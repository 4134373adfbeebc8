"""Forms made from the settings' own JSON Schema, so that they cannot drift from the command line."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from mixofshow.errors import shown
from mixofshow.reading import parse_value
from mixofshow.studio import web as gr

Kind = Literal["whole", "number", "switch", "choice", "text", "list", "value"]
KINDS: Final[Mapping[str, Kind]] = {
    "integer": "whole",
    "number": "number",
    "boolean": "switch",
    "array": "list",
    "string": "text",
}
READ: Final = ("whole", "number", "value")
"""Kinds that are typed as text and read as YAML."""
UNION: Final = ("anyOf", "oneOf")


@dataclass(frozen=True)
class Field:
    """One setting: its dotted key, and what a form must know of it."""

    key: str
    kind: Kind
    help: str = ""
    default: Any = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def group(self) -> str:
        """What comes before the last dot."""
        return self.key.rpartition(".")[0]

    @property
    def label(self) -> str:
        """The last part of the key in words."""
        words = self.key.rpartition(".")[2].replace("_", " ")
        return words[:1].upper() + words[1:]


def fields_of(schema: Mapping[str, Any], leave_out: Collection[str] = ()) -> list[Field]:
    """The fields of a model's schema, those of groups by dotted keys, in their order; left out are also whole groups."""
    every = _fields(schema, schema.get("$defs", {}), "")
    return [one for one in every if not {one.key, one.key.partition(".")[0]} & set(leave_out)]


def _fields(schema: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[Field]:
    for key, entry in schema.get("properties", {}).items():
        inner = _resolved(entry, known)
        if "properties" in inner:
            yield from _fields(inner, known, f"{prefix}{key}.")
        else:
            yield _field(prefix + key, {**inner, **entry}, inner)


def _resolved(entry: Mapping[str, Any], known: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an entry is, behind references and beside null; a choice between several kinds is read as YAML."""
    if "$ref" in entry:
        return _resolved(known[entry["$ref"].rpartition("/")[2]], known)
    options = [one for union in UNION for one in entry.get(union, ()) if one.get("type") != "null"]
    if len(options) == 1:
        return _resolved(options[0], known)
    return {"type": "any"} if options else entry


def _field(key: str, entry: Mapping[str, Any], inner: Mapping[str, Any]) -> Field:
    choices = tuple(inner.get("enum", ()))
    kind: Kind = "choice" if choices else KINDS.get(inner.get("type", ""), "value")
    low, high = (inner.get(name, inner.get(f"exclusive{name.capitalize()}")) for name in ("minimum", "maximum"))
    default = entry.get("default")
    return Field(key, kind, entry.get("description", ""), default, choices, low, high)


def component(field: Field, **more: Any) -> Any:
    """The field as part of a page. Numbers and texts are empty where the default holds, which is said.

    Numbers are typed as text, so that what is wrong with one is said by the settings themselves, in their words.
    """
    common: dict[str, Any] = {"label": field.label, "info": field.help or None, **more}
    common["elem_classes"] = f"field-{field.key.replace('.', '-').replace('_', '-')}"
    if field.kind == "switch":
        return gr.Checkbox(value=bool(field.default), **common)
    if field.kind == "choice":
        return gr.Dropdown(choices=list(field.choices), value=field.default, **common)
    return gr.Textbox(value="", placeholder=_usual(field.default), lines=2 if field.kind == "list" else 1, **common)


def _usual(default: Any) -> str:
    """What holds where nothing is typed, as one would type it."""
    if default in (None, "", [], ()) and default is not False:
        return ""
    if isinstance(default, bool):
        return f"default: {str(default).lower()}"
    lines = map(str, default) if isinstance(default, list | tuple) else [str(default)]
    return f"default: {shown(' | '.join(lines))}"


def table_of(fields: Sequence[Field], values: Sequence[Any]) -> dict[str, Any]:
    """What was filled in, by dotted keys; what is empty, or the default, is left out. Raises SettingsError."""
    table: dict[str, Any] = {}
    for field, value in zip(fields, values, strict=True):
        if value is None or value == "" or (field.kind in ("switch", "choice") and value == field.default):
            continue
        if field.kind == "list":
            table[field.key] = [line for line in str(value).splitlines() if line.strip()]
        elif field.kind in READ and isinstance(value, str):
            table[field.key] = parse_value(value, field.label)
        else:
            table[field.key] = value
    return table


def values_of(fields: Sequence[Field], table: Mapping[str, Any]) -> list[Any]:
    """What a form shows for a table with dotted keys: the other way round."""
    return [_shown_value(field, table.get(field.key, field.default)) for field in fields]


def _shown_value(field: Field, value: Any) -> Any:
    if field.kind in ("switch", "choice"):
        return value
    if value is None or value == field.default:
        return ""
    return "\n".join(map(str, value)) if field.kind == "list" else str(value)
