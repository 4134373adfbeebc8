"""The center's app: one round, in a process of Flower's beside the SuperLink."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


def main(grid: Grid, context: Context) -> None:
    """The round that the run's settings name."""
    from mixofshow.errors import BadInputError
    from mixofshow.federation.apps import begin_app
    from mixofshow.federation.center import FOLDER_VARIABLE, ROUNDS, state_of
    from mixofshow.federation.plan import Plan
    from mixofshow.federation.rounds import Round
    from mixofshow.reading import parse_json, read_bytes

    folder = Path(os.environ[FOLDER_VARIABLE])
    begin_app(folder)
    place = folder / ROUNDS / _plain(str(context.run_config["round"]))
    plan = Plan.of(parse_json(read_bytes(place / "plan.json", error=BadInputError), "plan.json"), "plan.json")
    Round(grid, folder, place, plan, state_of(folder), context=context).run()


def _plain(name: str) -> str:
    """A round's name, which leads nowhere else. Raises BadInputError."""
    from mixofshow.errors import BadInputError, shown

    if not name.replace("-", "").isdigit():
        raise BadInputError(f"round: expected a name like 20261127-184500, found {shown(name)}")
    return name


app.main()(main)
