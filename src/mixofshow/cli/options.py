"""Command-line options made from settings: a setting is written down once, and is an option wherever it is one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mixofshow.errors import SettingsError, shown
from mixofshow.tuning.settings import dotted_keys

Command = Callable[..., None]
BASE_PANEL: Final = "Base model"
Base = Annotated[
    str,
    typer.Option(
        help="emojiland, a diffusers folder, a .safetensors checkpoint, or a hub id in the local cache.",
        rich_help_panel=BASE_PANEL,
    ),
]
LOADING: Final[dict[str, tuple[Any, Any]]] = {
    name: (kind, typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel=BASE_PANEL))
    for name, kind, text in (
        ("dtype", str, "Its weights as fp32, bf16 or fp16; default fp32, of tune what --precision says."),
        ("variant", str, "Which of its weight files, such as fp16."),
        ("config", str, "Of an unusual .safetensors checkpoint: a diffusers folder, or hub id, of the same kind."),
        (
            "prediction",
            str,
            "What its UNet predicts, where neither file nor configuration says so: epsilon or v_prediction.",
        ),
        (
            "clip_skip",
            str,
            "How many of its text encoders' last layers to leave out, or of each, as 0,1: A1111's clip skip 2 is 1 here.",
        ),
        ("allow_base", str, "'sister': also take concepts made for another base of the same family and shapes."),
        ("download", bool, "Fetch what is not in the local cache."),
    )
}
"""Options of `load_base`, for every command that loads a base."""
Storage = Annotated[str, typer.Option(help="How recordings are kept: fp64, fp32, fp16 or low-rank (plus diagonal).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]


def bases(*names: str | None) -> list[Path]:
    """Those of the names of base models, or of models, that may be files or folders here."""
    from mixofshow.bases.loading import EMBEDDED
    from mixofshow.reading import named_in

    return [named_in(Path(), name) for name in names if name and name not in EMBEDDED]


def assignments(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as a table; values are read as YAML. Raises SettingsError."""
    from mixofshow.reading import parse_value

    table = {}
    for pair in pairs or []:
        key, found, value = pair.partition("=")
        if not found:
            raise SettingsError(f"'{shown(pair)}': expected KEY=VALUE")
        table[key] = parse_value(value, f"'{shown(pair)}'")
    return table


def with_settings(model: type[BaseModel], *, leave_out: Collection[str] = ()) -> Callable[[Command], Command]:
    """Gives a command an option for every setting by its dotted name, handed over as a table `given`."""
    settings = {key.replace(".", "__"): (key, field) for key, field in dotted_keys(model) if key not in leave_out}
    options = [_setting_option(name, *setting) for name, setting in settings.items()]
    former = getattr(model, "former", {})
    for old, now in former.items():
        options.append(_setting_option(old, old, model.model_fields.get(now, FieldInfo(annotation=str)), hidden=True))
    return _with_options(options, {name: key for name, (key, _) in settings.items()} | {old: old for old in former}, "given")


def with_loading(command: Command) -> Command:
    """Gives a command the options of how its base model is loaded, handed over as `load_base`'s in a table `loading`."""
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])
        for name, (kind, option) in LOADING.items()
    ]
    return _with_options(options, {name: name for name in LOADING}, "loading")(command)


def _with_options(options: list[Parameter], keys: Mapping[str, str], table: str) -> Callable[[Command], Command]:
    """Gives a command more options; those that were given are handed over as one table, under their keys."""

    def wrap(command: Command) -> Command:
        own = [one for one in signature(command, eval_str=True).parameters.values() if one.name != table]

        @functools.wraps(command)
        def called(*args: Any, **values: Any) -> None:
            given = {key: values.pop(name) for name, key in keys.items() if name in values}
            command(*args, **values, **{table: {key: value for key, value in given.items() if value not in (None, [])}})

        called.__signature__ = Signature([*own, *options])  # type: ignore[attr-defined]
        called.__annotations__ = {one.name: one.annotation for one in (*own, *options)}
        return called

    return wrap


def _setting_option(name: str, key: str, field: Any, *, hidden: bool = False) -> Parameter:
    spellings = [f"--{spelling}" for spelling in dict.fromkeys((key.replace("_", "-"), key))]
    kind: Any = str
    if field.annotation is bool:
        kind, spellings = bool, [f"{one}/--no-{one.removeprefix('--')}" for one in spellings[:1]]
    elif get_origin(field.annotation) is tuple:
        kind = list[str]
    panel = f"Settings: {key.rpartition('.')[0] or 'the run'}"
    option = typer.Option(*spellings, help=_help(field), rich_help_panel=panel, metavar="VALUE", hidden=hidden)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _help(field: Any) -> str:
    """What a setting is, which values it takes, and its default."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    said = (field.description or "").rstrip(".")
    parts = [f"{said}." if said else "", f"One of {', '.join(map(str, choices))}." if choices else ""]
    plain = isinstance(field.default, str | int | float) and not isinstance(field.default, bool)
    parts.append(f"Default: {field.default}." if plain else "On by default." if field.default is True else "")
    return " ".join(part for part in parts if part)
