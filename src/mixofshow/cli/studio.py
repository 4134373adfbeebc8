"""The studio in a browser."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from mixofshow.cli.options import Base, Device, with_loading
from mixofshow.terminal import say

app = typer.Typer()


@app.command()
@with_loading
def studio(
    *,
    workspace: Annotated[
        Path, typer.Argument(help="Folder that holds everything: concepts, models, pictures, tuning.")
    ] = Path("studio"),
    base: Base = "emojiland",
    concept: Annotated[
        list[Path] | None, typer.Option("--concept", help="A concept file to put onto the shelf; any number.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others can reach needs --token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="MIXOFSHOW_TOKEN", help="What everybody must know who opens the page.")
    ] = None,
    device: Device = "cpu",
    loading: dict[str, Any],
) -> None:
    """Open the studio: tune, fuse and draw in a browser. Needs the extra `studio`; Ctrl-C ends it."""
    from mixofshow.bases.loading import EMBEDDED
    from mixofshow.studio.server import check_address, serve
    from mixofshow.studio.shelf import put_on
    from mixofshow.studio.workspace import Workspace

    check_address(host, token)
    if base not in EMBEDDED and Path(base).exists():
        base = str(Path(base).absolute())  # for the studio works in its own folder
    place = Workspace(workspace.resolve(), base, {"device": device, **loading})
    put_on(place, concept or [])
    page, behind, address = serve(place, host=host, port=port, token=token)
    say(f"{address} (workspace {workspace}); Ctrl-C ends it")
    try:
        threading.Event().wait()  # Gradio's own way of waiting ends at Ctrl-C as if nothing had happened
    finally:
        behind.jobs.close()  # what is being tuned keeps what it has learned
        page.close(verbose=False)
