"""What the center's operator tells the SuperLink, on the loopback: who may join, and that a round begins."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from mixofshow.errors import BadInputError, ResourceError, shown
from mixofshow.federation.bundle import APP_ID, signed_app
from mixofshow.federation.keys import AUTHORITY, TLS, members
from mixofshow.federation.watched import LOCKED_FOR

DATABASE: Final = "superlink.db"
STRUCK_OFF: Final = "unregistered"
RUNS: Final = {"completed": "", "failed": "its app failed", "stopped": "it was stopped"}
"""How Flower says that a run has ended (`SubStatus`), and what is wrong then."""


class Busy(ResourceError):
    """The center is there, and has not answered yet."""


@contextlib.contextmanager
def control(folder: Path, address: str) -> Iterator[Any]:
    """Flower's client for the operator of the SuperLink at this address. Raises ResourceError where nobody answers."""
    import httpx
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    client = ControlHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=(folder / TLS / AUTHORITY).read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield client
    except httpx.TimeoutException as error:
        raise Busy(f"the center takes its time at {address} ({shown(error)})") from error
    except httpx.TransportError as error:
        raise ResourceError(f"the center does not answer at {address} ({shown(error)}); is it running?") from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code >= 500:  # its database was locked for too long, for one
            raise Busy(f"the center could not answer at {address}; its superlink.log says why") from error
        said = shown(error.response.text, 200)
        raise BadInputError(f"the center refused: {said}") from error
    finally:
        client.close()


def register_members(client: Any, folder: Path) -> None:
    """Let those on the list join, and no others. Raises BadInputError for a key that is none."""
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest

    listed, known, there = members(folder), set[bytes](), set[tuple[str, bytes]]()
    for node in client.ListNodes(ListNodesRequest()).nodes_info:
        known.add(node.public_key)
        if node.status == STRUCK_OFF:
            continue
        if (node.name, node.public_key) in listed.items():
            there.add((node.name, node.public_key))
        else:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
    new = listed.items() - there
    _forget(folder, known & {key for _, key in new})
    for name, key in sorted(new):
        client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))


def _forget(folder: Path, keys: Collection[bytes]) -> None:
    """Keys that were struck off may be entered again, which Flower, who keeps them, never allows (flwr 1.42)."""
    with contextlib.closing(sqlite3.connect(folder / DATABASE, timeout=LOCKED_FOR)) as state, state:
        state.executemany("DELETE FROM node WHERE public_key = ? AND status = ?", [(key, STRUCK_OFF) for key in keys])


def store_app(database: Path) -> None:
    """Enter the signed app into a SuperLink's database, with its signature, before the SuperLink opens it.

    `flwr run` has no way to hand a signature over (flwr 1.42): it keeps those that it finds for an app of Flower's hub.
    """
    from flwr.common.constant import NOOP_FLWR_AID
    from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
    from flwr.supercore.fab import Fab
    from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories

    _, factory = get_objectstore_linkstate_factories(str(database), get_federation_manager())
    app, verifications = signed_app()
    fab = Fab(hashlib.sha256(app).hexdigest(), app, verifications)
    factory.state().store_app(fab, NOOP_FEDERATION_ID, APP_ID, TaskType.SERVER_APP, NOOP_FLWR_AID)


def start_run(client: Any, round_name: str) -> int:
    """Start the stored app for a round. Raises ResourceError where the SuperLink starts none."""
    from flwr.common.serde import user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab

    app, _ = signed_app()
    request = StartRunRequest(
        fab=Fab(hash_str=hashlib.sha256(app).hexdigest()),
        app_spec=APP_ID,
        override_config=user_config_to_proto({"round": round_name}),
    )
    answer = client.StartRun(request)
    if not answer.HasField("run_id"):
        raise ResourceError("the center started no run; its superlink.log says why")
    number: int = answer.run_id
    return number


def run_ended(client: Any, number: int) -> str | None:
    """None while a run goes on; at its end what is wrong, or nothing."""
    from flwr.proto.control_pb2 import ListRunsRequest

    run = client.ListRuns(ListRunsRequest(run_id=number)).run_dict[number]
    if run.status.status != "finished":
        return None
    return RUNS.get(run.status.sub_status, run.status.sub_status) and f"{run.status.sub_status}: {run.status.details}"


def stop_all_runs(client: Any) -> None:
    """End what was begun by a center, or by a `federate`, that was killed: it would go on beside its successor."""
    from flwr.proto.control_pb2 import ListRunsRequest

    for number, run in client.ListRuns(ListRunsRequest()).run_dict.items():
        if run.status.status != "finished":
            stop_run(client, number)


def stop_run(client: Any, number: int) -> None:
    """End a run before its time, unless it has ended."""
    import httpx
    from flwr.proto.control_pb2 import StopRunRequest

    with contextlib.suppress(httpx.HTTPStatusError):
        client.StopRun(StopRunRequest(run_id=number))
