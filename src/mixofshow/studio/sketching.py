"""What a composition is drawn from beside words and places: a picture to start from, and sketches that networks follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mixofshow.bases.loading import EMBEDDED_CONTROLS
from mixofshow.errors import BadInputError, SettingsError, shown
from mixofshow.reading import read_bytes
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.pictures import MAX_BYTES, read_picture
from mixofshow.sampling.settings import ControlEntry
from mixofshow.studio.workspace import Workspace


def uploaded(path: Path) -> Image.Image:
    """A picture that a visitor dropped. Raises BadInputError that calls it by its name."""
    return read_picture(read_bytes(path, MAX_BYTES, BadInputError, shown(path.name)), "RGB", path.name)


def networks(workspace: Workspace) -> list[str]:
    """The networks that can follow a sketch: those that come with the base, and the folders in `controls`."""
    own = sorted(one.parent.name for one in workspace.controls.glob("*/config.json"))
    return [*(name for name in EMBEDDED_CONTROLS if name.startswith(f"{workspace.base}-")), *own]


def following(workspace: Workspace, sketch: Image.Image, network: str, **extent: Any) -> dict[str, Any]:
    """A control as a table: the sketch becomes one of the inputs. `extent` are its strength, start and end.

    Raises SettingsError.
    """
    if network not in networks(workspace):
        raise SettingsError(f"no network is called '{shown(network)}'; put its folder into the workspace's `controls`")
    own = workspace.controls / network
    named = {"network": str(own) if own.is_dir() else network, "picture": str(workspace.put(sketch))}
    asked = {key: value for key, value in extent.items() if value is not None}
    table = {"prompt": "", "controls": [named | asked]}
    (made,) = make_composition(table, "sketch", workspace.folder).controls
    return made.model_dump(mode="json", exclude_defaults=True)


def is_here(workspace: Workspace, control: ControlEntry) -> bool:
    """Whether a control's picture and network are this workspace's, or come with the package."""
    picture, network = Path(control.picture).resolve(), Path(control.network).resolve()
    known = control.network in EMBEDDED_CONTROLS or network.parent == workspace.controls.resolve()
    return known and picture.is_file() and picture.parent == workspace.inputs.resolve()


def in_words(given: Mapping[str, Any]) -> list[str]:
    """What of this a composition is drawn from, a line each."""
    said = [f"Follows a sketch, by {shown(one['network'])}." for one in given.get("controls", [])]
    if "redo" in given:
        return [*said, "Draws one region over, of a picture that is there."]
    return [*said, *(["Starts from the picture under the regions."] if "image" in given else [])]
