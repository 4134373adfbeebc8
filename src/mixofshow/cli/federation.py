"""A center and its clients over a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixofshow.cli.options import Base, Device
from mixofshow.errors import SettingsError, shown
from mixofshow.terminal import say

app = typer.Typer()
center_app = typer.Typer(help="Start a center, and say who may join it.")
app.add_typer(center_app, name="center")
Folder = Annotated[Path, typer.Option(help="The center's folder: its keys, its members, and what arrives.")]


@center_app.callback(invoke_without_command=True)
def center(
    context: typer.Context,
    folder: Folder = Path("center"),
    base: Base = "emojiland",
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all of this machine's.")] = "0.0.0.0",  # noqa: S104
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    name: Annotated[list[str] | None, typer.Option(help="A name or address under which clients reach it.")] = None,
    device: Device = "cpu",
) -> None:
    """Start a center for a base model, and let those on its list join until Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    from mixofshow.federation.center import LOG, running_center
    from mixofshow.federation.keys import AUTHORITY, TLS, members

    with running_center(folder, base, hosts=name or [], host=host, port=port, device=device) as process:
        say(f"center for {base} on {host}:{port}, {len(members(folder))} may join; Ctrl-C ends it")
        say(f"clients need {folder / TLS / AUTHORITY}")
        process.wait()
    raise SettingsError(f"the SuperLink ended; {folder / LOG} says why")


@center_app.command()
def keys(
    folder: Folder = Path("center"),
    name: Annotated[list[str] | None, typer.Option(help="A name or address under which clients reach it.")] = None,
) -> None:
    """Make the center's own authority and certificate, unless they are there."""
    from mixofshow.federation.keys import AUTHORITY, TLS, make_tls
    from mixofshow.federation.launch import require_flower

    require_flower()
    make_tls(folder, name or [])
    say(f"{folder / TLS / AUTHORITY}: give this to those who join; all else in {folder / TLS} stays here")


@center_app.command()
def admit(
    member: Annotated[str, typer.Argument(help="What the center calls the member.")],
    key: Annotated[str, typer.Argument(help="The member's public key, as `mixofshow join` prints it, or its file.")],
    folder: Folder = Path("center"),
) -> None:
    """Put a member on the list of those who may join; it counts from the next round or start on."""
    from mixofshow.federation.keys import MAX_KEY_BYTES, admit
    from mixofshow.reading import read_bytes

    line = key
    if not key.startswith("ecdsa-"):
        if not Path(key).is_file():
            raise SettingsError(f"'{shown(key)}': expected a key as `mixofshow join` prints it, ecdsa-…, or its file")
        line = read_bytes(Path(key), MAX_KEY_BYTES, SettingsError).decode(errors="replace")
    say(f"{admit(folder, member, line)}: may join")


@center_app.command()
def expel(member: Annotated[str, typer.Argument(help="The member's name.")], folder: Folder = Path("center")) -> None:
    """Strike a member from the list; its concept stays in the model until a plan removes it."""
    from mixofshow.federation.keys import expel

    expel(folder, member)
    say(f"{member}: may not join any more, from the next round or start on")


@app.command()
def join(
    address: Annotated[str, typer.Argument(metavar="CENTER", help="The center's address, as center.example:8000.")],
    *,
    ca: Annotated[Path, typer.Option(help="The center's ca.pem, from its operator.")],
    name: Annotated[str | None, typer.Option(help="The concept's name; one of a file is in it.")] = None,
    class_word: Annotated[str, typer.Option(help="Its class word, as for tune.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder of pictures to tune on. They stay here.")] = None,
    concept: Annotated[Path | None, typer.Option(help="Or a concept file that is there already.")] = None,
    folder: Annotated[Path | None, typer.Option(help="The client's folder, default NAME-client.")] = None,
    approve: Annotated[str, typer.Option(help="ask: before a file is sent; always: send without.")] = "ask",
    judge: Annotated[Path | None, typer.Option(help="Held-out pictures, to judge the fused model on.")] = None,
    clip: Annotated[str | None, typer.Option(help="A CLIP to judge with, on another base than emojiland.")] = None,
    want_model: Annotated[bool, typer.Option("--want-model", help="Get the fused model, as a delta file.")] = False,
    base: Base = "emojiland",
    device: Device = "cpu",
) -> None:
    """Join a center as a client, until Ctrl-C: tune on your own pictures, or offer a file, when a round asks for it."""
    from mixofshow.federation.join import asker, attend, look_for, running_client, typed
    from mixofshow.federation.keys import make_node_key
    from mixofshow.federation.launch import require_flower
    from mixofshow.federation.owner import KEY, ClientSettings
    from mixofshow.outputs import check_outputs

    require_flower()
    name = name or _name_of(concept)
    offer: dict[str, Any] = {"name": name, "class_word": class_word, "approve": approve, "want_model": want_model}
    paths = {"data": data, "concept": concept, "judge": judge}
    offer |= {key: str(path.absolute()) if path else None for key, path in paths.items()}
    settings = ClientSettings(**offer, clip=clip, base=base, device=device)
    for path in (ca, *(one for one in paths.values() if one)):
        if not path.exists():
            raise SettingsError(f"{path}: is not there")
    look_for(address, ca)
    place = folder or Path(f"{name}-client")
    check_outputs(shared=[place], inputs=[data])
    say(f"this client's key, for the center's operator: {make_node_key(place / KEY)}")
    with running_client(place, address, ca, settings) as supernode:
        say(f"joining {address} with <{name}>; what goes wrong stands in {place}/apps.log; Ctrl-C ends it")
        attend(supernode, place, asker(typed))


def _name_of(concept: Path | None) -> str:
    from mixofshow.concepts.concept import load_concept

    if concept is None:
        raise SettingsError("--name is missing: what the concept that is tuned here is to be called")
    return load_concept(concept).info.name


@app.command()
def federate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The round, in YAML.")],
    folder: Folder = Path("center"),
) -> None:
    """Start a round at the running center, and print what came of it."""
    from mixofshow.errors import BadInputError
    from mixofshow.federation.center import run_round
    from mixofshow.federation.outcome import told
    from mixofshow.federation.plan import read_plan

    asked = read_plan(plan)
    say(f"waiting up to {asked.wait:g} s for {', '.join(asked.expect) or 'whoever comes'}; then each step takes its time")
    report = run_round(folder, asked)
    say(*told(report))
    if report["why_not"]:
        raise BadInputError(f"nothing was fused: {report['why_not']}")
