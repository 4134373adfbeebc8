"""The center's front door: what clients may say, and no more, on the port that the world sees.

A SuperLink (flwr 1.42) answers on one port what clients ask (Fleet), what its operator asks (Control) and what
its own programs ask (Runtime). Without accounts, which the open version has no server for, whoever reaches that port may
start runs, enter node keys, and take the center's own tasks with all that clients sent. So the SuperLink listens on the
loopback only, and this door lets through what belongs to the Fleet, signed by its node's key, and not too much of it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mixofshow.errors import BadInputError
from mixofshow.federation.keys import AUTHORITY, TLS

FLEET: Final = "/v1/fleet/"
MAX_REQUEST: Final = 64 * 2**20
"""Bytes of one request. Flower cuts arrays into 5 MB; values, which it does not cut, are small here."""
QUOTA: Final = 8 * 2**30
"""Bytes that one node may send in a window of time: some concepts and the largest recordings."""
WINDOW: Final = 86_400.0
NODE_HEADER: Final = "flwr-public-key"
STARTS_WITHIN: Final = 20.0
PATIENCE: Final = 120.0
"""Seconds that the SuperLink may take for one answer."""


@dataclass
class Meter:
    """How much the SuperLink took from each node, by its public key, in the present window."""

    quota: int
    started: float = field(default_factory=time.monotonic)
    sent: dict[str, int] = field(default_factory=dict)

    def allows(self, node: str, count: int) -> bool:
        """Whether so much more is within the node's share."""
        if time.monotonic() - self.started > WINDOW:
            self.started, self.sent = time.monotonic(), {}
        return self.sent.get(node, 0) + count <= self.quota

    def count(self, node: str, count: int) -> None:
        """Note what was taken: only a node whose signature was good is counted, so nobody uses up another's share."""
        self.sent[node] = self.sent.get(node, 0) + count


def make_door(inner: str, authority: Path, meter: Meter) -> Any:
    """The application that hands requests of the Fleet on to the SuperLink at the address `inner`."""
    import ssl

    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        trust = ssl.create_default_context(cafile=str(authority))
        async with httpx.AsyncClient(base_url=f"https://{inner}", verify=trust, timeout=PATIENCE) as client:
            app.state.client = client
            yield

    async def hand_on(request: Request) -> Response:
        """The SuperLink's answer, or why there is none."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_REQUEST:
                return PlainTextResponse("more than a client may send at once", 413)
        node = request.headers.get(NODE_HEADER, "")
        if not meter.allows(node, len(body)):
            return PlainTextResponse("more than a client may send in a day", 413)
        kept = {k: v for k, v in request.headers.items() if k not in ("host", "content-length", "transfer-encoding")}
        try:
            answer = await request.app.state.client.post(request.url.path, content=bytes(body), headers=kept)
        except httpx.TransportError:
            return PlainTextResponse("the center is starting or gone", 503)
        if answer.status_code == 500:  # a SuperNode would end at that, and asks again at this
            return PlainTextResponse("the center could not answer; its superlink.log says why", 503)
        if answer.is_success:
            meter.count(node, len(body))
        gone = ("content-length", "transfer-encoding", "content-encoding", "connection")
        headers = {k: v for k, v in answer.headers.items() if k not in gone}
        return Response(answer.content, answer.status_code, headers)

    return Starlette(routes=[Route(FLEET + "{what}", hand_on, methods=["POST"])], lifespan=lifespan)


@contextlib.contextmanager
def open_door(folder: Path, host: str, port: int, inner: str) -> Iterator[None]:
    """The door is open while the block lasts. Raises BadInputError where nothing can listen there."""
    import uvicorn

    place = folder / TLS
    config = uvicorn.Config(
        make_door(inner, place / AUTHORITY, Meter(QUOTA)),
        host=host,
        port=port,
        ssl_certfile=str(place / "server.pem"),
        ssl_keyfile=str(place / "server.key"),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=_serve, args=(server,), daemon=True)
    thread.start()
    waited = time.monotonic()
    while not server.started:
        if not thread.is_alive() or time.monotonic() - waited > STARTS_WITHIN:
            raise BadInputError(f"{host}:{port}: nothing can listen there; is it in use? Choose another `port` or `host`")
        time.sleep(0.05)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(STARTS_WITHIN)


def _serve(server: Any) -> None:
    with contextlib.suppress(SystemExit):  # how it says that it cannot listen
        server.run()
