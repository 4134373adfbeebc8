"""The center: a SuperLink on the loopback, the door before it, and a folder for what arrives.

    tls/            its authority and certificate           members/     public keys of those who may join
    concepts/       files that were taken, by their hash    members.json who brought which
    recordings/     what they were recorded with            rounds/      plan, report and model of each round
    superlink.db    Flower's own state                      center.json  where the running center listens
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from mixofshow.errors import BadInputError, ResourceError, nearest, shown
from mixofshow.federation.apps import APPS_LOG
from mixofshow.federation.control import (
    DATABASE,
    Busy,
    control,
    register_members,
    run_ended,
    start_run,
    stop_all_runs,
    stop_run,
    store_app,
)
from mixofshow.federation.door import open_door
from mixofshow.federation.keys import AUTHORITY, TLS, make_tls, members
from mixofshow.federation.launch import (
    always_running,
    app_starter,
    environment,
    free_port,
    last_lines,
    require_flower,
    running,
)
from mixofshow.federation.plan import Plan
from mixofshow.outputs import holding, write_text
from mixofshow.reading import parse_json, read_bytes

PORT: Final = 8000
FOLDER_VARIABLE: Final = "MIXOFSHOW_CENTER"
"""Tells the app, which Flower starts, where the center's folder is; clients are not told."""
STATE: Final = "center.json"
LOG: Final = "superlink.log"
ROUNDS: Final = "rounds"
STARTS_WITHIN: Final = 90.0
LOOKS_EVERY: Final = 2.0


class CenterState(BaseModel):
    """What a center is for, and where its operator's programs reach it while it runs."""

    model_config = ConfigDict(frozen=True)

    base: str
    device: str = "cpu"
    inner: str = ""


@contextlib.contextmanager
def running_center(folder: Path, base: str, *, hosts: list[str], host: str, port: int, device: str) -> Iterator[Any]:
    """A center, while the block lasts; yields the SuperLink's process. Raises BadInputError, ResourceError."""
    require_flower()
    folder.mkdir(parents=True, exist_ok=True)
    make_tls(folder, hosts)
    with holding(folder) as held:
        if held is False:
            raise BadInputError(f"{folder}: another center runs there")
        store_app(folder / DATABASE)
        inner = f"127.0.0.1:{free_port()}"
        env = environment(folder, **{FOLDER_VARIABLE: str(folder.absolute())})
        with running(_superlink(folder, inner), env, folder / LOG) as process:
            _wait_for(folder, inner, process)
            apps = app_starter(inner, "--root-certificates", str(folder.absolute() / TLS / AUTHORITY))
            with open_door(folder, host, port, inner):
                # Not before: whoever finds this file may come at once, and apps read it.
                state = CenterState(base=base, device=device, inner=inner)
                write_text(folder / STATE, state.model_dump_json() + "\n")
                with always_running(apps, env, folder / LOG):
                    yield process


def _superlink(folder: Path, inner: str) -> list[str]:
    """Flower's command. Node keys need TLS, which is also on the loopback."""
    host, _, port = inner.partition(":")
    place = folder.absolute() / TLS
    tls = {"--ssl-ca-certfile": AUTHORITY, "--ssl-certfile": "server.pem", "--ssl-keyfile": "server.key"}
    options = [text for option, name in tls.items() for text in (option, str(place / name))]
    state = ["--database", str(folder.absolute() / DATABASE), "--isolation", "process"]
    more = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    return ["flower-superlink", "--host", host, "--port", port, *state, *options, *more]


def _wait_for(folder: Path, inner: str, process: Any) -> None:
    """Until the SuperLink answers and knows who may join."""
    until = time.monotonic() + STARTS_WITHIN
    while True:
        try:
            with control(folder, inner) as client:
                register_members(client, folder)
                return
        except ResourceError as error:
            if process.poll() is not None or time.monotonic() > until:
                log = folder / LOG
                raise ResourceError(f"the SuperLink did not start; {log} ends: {shown(last_lines(log), 300)}") from error
            time.sleep(0.3)


def state_of(folder: Path) -> CenterState:
    """The state of the center in a folder. Raises BadInputError where none was ever started."""
    path = folder / STATE
    if not path.is_file():
        raise BadInputError(f"{folder}: no center was started there; `mixofshow center` with this folder does")
    try:
        return CenterState.model_validate(parse_json(read_bytes(path), str(path)))
    except ValidationError as error:
        raise BadInputError(f"{path}: damaged; start the center again") from error


def run_round(folder: Path, plan: Plan) -> dict[str, Any]:
    """Start a round at the running center, wait for its end, and return its report. Raises BadInputError, ResourceError.

    Broken off and started again, a round goes on with what has arrived.
    """
    require_flower()
    state = state_of(folder)
    _all_may_join(plan.expect, list(members(folder)))
    (folder / ROUNDS).mkdir(exist_ok=True)
    with holding(folder / ROUNDS) as held:
        if held is False:
            raise BadInputError(f"{folder}: a round is under way; wait for its end, or end it with Ctrl-C where it runs")
        return _run(folder, plan, state)


def _all_may_join(expected: Iterable[str], known: list[str]) -> None:
    for name in expected:
        if name not in known:
            raise BadInputError(f"expect: '{shown(name)}' is not admitted{nearest(name, known)}; `mixofshow center admit` does")


def _run(folder: Path, plan: Plan, state: CenterState) -> dict[str, Any]:
    name = time.strftime("%Y%m%d-%H%M%S")
    place = folder / ROUNDS / name
    place.mkdir(exist_ok=True)
    write_text(place / "plan.json", plan.model_dump_json(indent=1) + "\n")
    with control(folder, state.inner) as client:
        register_members(client, folder)
        stop_all_runs(client)
        number = start_run(client, name)
    try:
        while (wrong := _ended(folder, state.inner, number)) is None:
            time.sleep(LOOKS_EVERY)
    except (KeyboardInterrupt, SystemExit):  # the latter is SIGTERM
        with control(folder, state.inner) as client:
            stop_run(client, number)
        raise
    report = place / "report.json"
    if not report.is_file():
        raise ResourceError(f"the round ended without a report ({shown(wrong, 200)}); {folder / APPS_LOG} or {LOG} says more")
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def _ended(folder: Path, inner: str, number: int) -> str | None:
    """As `run_ended`; a center that has too much to do to answer is asked again."""
    try:
        with control(folder, inner) as client:
            return run_ended(client, number)
    except Busy:
        return None
