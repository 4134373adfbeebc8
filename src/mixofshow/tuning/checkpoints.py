"""Checkpoints of a tuning run: written whole, read back before older ones go, and taken up only by the same run."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

import torch

from mixofshow.errors import BadInputError, MixOfShowError, ResourceError, SettingsError, shown
from mixofshow.outputs import holding, is_among, refusals, sweep, writing

logger = logging.getLogger(__name__)
FORMAT: Final = 1
KEPT: Final = 2
FOLDER: Final = "checkpoints"
SUFFIX: Final = ".safetensors"
LISTED: Final = 20
NAME: Final = re.compile(r"step-(\d{8,})\.pt")
Fact = str | int | float | bool | None
State = dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same run: facts by dotted name, and a digest of each picture by its name."""

    facts: dict[str, Fact]
    pictures: dict[str, str]

    @classmethod
    def of(cls, settings: Mapping[str, Fact], pictures: Mapping[str, str], *, base_fingerprint: str) -> Self:
        """The settings, and beside them the base model, the libraries and the format of checkpoints."""
        facts: dict[str, Fact] = {
            f"version of {name}": version(name) for name in ("torch", "diffusers", "transformers", "peft")
        }
        facts |= {"base model's fingerprint": base_fingerprint, "checkpoint format": FORMAT}
        return cls({**settings, **facts}, dict(pictures))


def differences(saved: Identity, now: Identity, *, may_grow: Collection[str] = ()) -> list[str]:
    """A line for each fact and picture that is not the same; numbers in `may_grow` may not get smaller."""
    lines = []
    for name in {**saved.facts, **now.facts}:
        old, new = saved.facts.get(name), now.facts.get(name)
        grown = name in may_grow and isinstance(old, int | float) and isinstance(new, int | float) and new >= old
        if old != new and not grown:
            lines.append(f"{name}: {shown(old)} -> {shown(new)}")
    for name in sorted({**saved.pictures, **now.pictures}):
        if saved.pictures.get(name) != now.pictures.get(name):
            what = "new" if name not in saved.pictures else "changed" if name in now.pictures else "gone"
            lines.append(f"picture {shown(name)}: {what}")
    return lines


def save(folder: Path, step: int, state: Mapping[str, Any], identity: Identity) -> Path:
    """Write `step-STEP.pt` and keep the one before it. State is tensors, numbers, texts, lists and tables of them.

    Raises ResourceError, which names the last good checkpoint, when the disk refuses.
    """
    _keep_newest(folder, step)  # those that a process left that was killed before it came to it
    path, content = folder / f"step-{step:08d}.pt", io.BytesIO()  # torch would turn the disk's errors into its own
    torch.save({"step": step, "identity": vars(identity), "state": dict(state)}, content)
    try:
        with writing(path) as temporary:
            temporary.write_bytes(content.getbuffer())
            _verify(temporary, content.getvalue(), step)
    except MixOfShowError as error:
        raise ResourceError(f"{error}; last good checkpoint: {newest(folder) or 'none yet'}") from error
    _keep_newest(folder, step)
    return path


def _keep_newest(folder: Path, step: int) -> None:
    """Remove all but the last up to a step; later ones are of another history."""
    for _, old in sorted(one for one in _found(folder) if one[0] <= step)[:-KEPT]:
        _remove(old)


def run_folder(target: Path, inputs: Iterable[Path | None] = ()) -> Path:
    """Where a run that writes the concept `target` leaves checkpoints, curves and previews.

    It is called as the file without its suffix, with `-run` behind where that is something else: pictures, for one.
    """
    plain = target.with_name(target.name.removesuffix(SUFFIX) or target.name)
    ours = not plain.exists() or (plain.is_dir() and ((plain / FOLDER).is_dir() or not any(plain.iterdir())))
    return plain if ours and plain != target and not is_among(plain, inputs) else plain.with_name(f"{plain.name}-run")


@contextlib.contextmanager
def working_in(folder: Path | None) -> Iterator[None]:
    """Inside, no other run works in the folder, which is made. Raises BadInputError, ResourceError."""
    if folder is None:
        yield
        return
    with refusals(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with holding(folder) as held:
        if held is False:
            raise BadInputError(f"{folder}: another run is at work there; wait for its end, or give another output")
        yield


def discard_but_newest(folder: Path) -> None:
    """Make room: of the checkpoints, only the newest that can be read stays."""
    if last := newest(folder):
        for _, path in _found(folder):
            if path != last:
                _remove(path)


def any_in(folder: Path) -> bool:
    """Whether there is a checkpoint, readable or not."""
    return bool(_found(folder))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that can be read."""
    return next((path for path, _ in _readable(folder)), None)


def load(folder: Path, identity: Identity, *, may_grow: Collection[str] = ()) -> tuple[int, State]:
    """Step and state (on the CPU) of the newest checkpoint that can be read.

    Raises BadInputError when there is none, SettingsError when it is of another run.
    """
    sweep(folder)
    for path, (step, saved, state) in _readable(folder):
        if lines := differences(saved, identity, may_grow=may_grow):
            more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
            raise SettingsError(f"{path}: cannot be resumed, it is of another run: {'; '.join(lines[:LISTED] + more)}")
        return step, state
    raise BadInputError(f"nothing to resume in {folder}: it holds no checkpoint that can be read")


def _readable(folder: Path) -> Iterator[tuple[Path, tuple[int, Identity, State]]]:
    """Checkpoints and their content, newest first; damaged ones are passed over with a warning."""
    for _, path in sorted(_found(folder), reverse=True):
        try:
            yield path, _content(path.read_bytes())
        except Exception as error:  # damage can surface as anything
            logger.warning("%s: cannot be read (%s); passed over", path, shown(error))


def _content(data: bytes) -> tuple[int, Identity, State]:
    """Step, identity and state; raises anything when a byte of them has changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if broken := archive.testzip():  # torch itself does not look at the checksums
            raise ValueError(f"wrong checksum of {broken}")
    content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return content["step"], Identity(**content["identity"]), content["state"]


def _verify(path: Path, data: bytes, step: int) -> None:
    if path.read_bytes() != data or _content(data)[0] != step:
        raise ResourceError(f"{path}: was not read back as it was written")


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints with their steps, readable or not."""
    files = {path: NAME.fullmatch(path.name) for path in folder.glob("*") if path.is_file()}
    return [(int(match[1]), path) for path, match in files.items() if match]


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # one file too many is no reason to stop
        path.unlink()
