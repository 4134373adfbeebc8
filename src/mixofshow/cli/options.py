"""Command-line options made from settings: a setting is written down once, and is an option wherever it is one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_origin

import typer
from pydantic import BaseModel

from mixofshow.errors import SettingsError, shown
from mixofshow.tuning.settings import dotted_keys

Command = Callable[..., None]
Base = Annotated[str, typer.Option(help="Base model: emojiland, a diffusers folder, or a hub id in the local cache.")]
Storage = Annotated[str, typer.Option(help="How recordings are kept: fp64, fp32, fp16 or low-rank (plus diagonal).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …")]


def assignments(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as a table; values are read as YAML. Raises SettingsError."""
    import yaml

    table = {}
    for pair in pairs or []:
        key, found, value = pair.partition("=")
        if not found:
            raise SettingsError(f"'{shown(pair)}': expected KEY=VALUE")
        try:
            table[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"'{shown(pair)}': not a value ({shown(error)})") from error
    return table


def with_settings(model: type[BaseModel], *, leave_out: Collection[str] = ()) -> Callable[[Command], Command]:
    """Gives a command an option for every setting by its dotted name, handed over as a table `given`."""
    settings = {key.replace(".", "__"): (key, field) for key, field in dotted_keys(model) if key not in leave_out}
    options = [_setting_option(name, *setting) for name, setting in settings.items()]

    def wrap(command: Command) -> Command:
        own = [one for one in signature(command, eval_str=True).parameters.values() if one.name != "given"]

        @functools.wraps(command)
        def called(**values: Any) -> None:
            given = {key: values.pop(name) for name, (key, _) in settings.items() if name in values}
            command(**values, given={key: value for key, value in given.items() if value not in (None, [])})

        called.__signature__ = Signature([*own, *options])  # type: ignore[attr-defined]
        called.__annotations__ = {one.name: one.annotation for one in (*own, *options)}
        return called

    return wrap


def _setting_option(name: str, key: str, field: Any) -> Parameter:
    spellings = [f"--{spelling}" for spelling in dict.fromkeys((key.replace("_", "-"), key))]
    kind: Any = str
    if field.annotation is bool:
        kind, spellings = bool, [f"{one}/--no-{one.removeprefix('--')}" for one in spellings[:1]]
    elif get_origin(field.annotation) is tuple:
        kind = list[str]
    panel = f"Settings: {key.rpartition('.')[0] or 'the run'}"
    option = typer.Option(*spellings, help=field.description, rich_help_panel=panel, metavar="VALUE")
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])
