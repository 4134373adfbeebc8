"""Outputs: where they may go is settled before any work begins; then they appear whole or not at all.

A file or folder is made in a hidden folder beside its place, under a lock that ends with the process, and takes the
name at the end. What killed processes left there is swept by the next that writes into the same place. What has the
name already is replaced only if it is a file of the same kind that we wrote, or a folder that holds nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from mixofshow.errors import NO_ROOM, REFUSED, BadInputError, MixOfShowError, ResourceError, shown
from mixofshow.replaceable import is_in_the_way, kind_of, list_files, strangers

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

STAGING: Final = (".mixofshow-", ".tmp")
"""How the names of hidden folders begin and end in which outputs are made; what is between is random."""
ASIDE: Final = "aside"
"""In such a folder: what was about to be replaced, where names cannot be exchanged at once."""
STALE_SECONDS: Final = 86_400
"""What is older belongs to nobody, where there are no locks to tell."""
RESERVED: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[<>:\"|?*].*|.*[. ]", re.IGNORECASE)
"""Names that Windows has for devices, or refuses."""
SUFFIXES: Final = {
    "PNG": (".png",),
    "HTML": (".html", ".htm"),
    "JSON": (".json",),
    "YAML": (".yaml", ".yml"),
    "safetensors": (".safetensors",),
    "another kind": (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".pdf", ".ckpt", ".pt", ".bin"),
}
"""How files of a kind are called; and those of kinds that we do not write."""
_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux


def check_outputs(
    *,
    files: Mapping[str, Iterable[Path | None]] | None = None,
    folders: Iterable[Path | None] = (),
    shared: Iterable[Path | None] = (),
    inputs: Iterable[Path | None] = (),
) -> None:
    """Raise unless all of this can be written where it is asked for, and none of it meets what is read.

    `files`, by their kinds, and `folders` are replaced as a whole, no file that is not ours and of the kind; `shared` folders are
    added to. `inputs` are what is read; what is not there is passed over. What killed processes left in these places is
    swept.

    Raises BadInputError for a name or place, ResourceError for a disk or its permissions.
    """
    kinds = {path: kind for kind, group in (files or {}).items() for path in group if path is not None}
    one_by_one = [path for group in (files or {}).values() for path in group if path is not None]
    whole, added = ([one for one in group if one is not None] for group in (folders, shared))
    for path in one_by_one:
        check_file(path)
    for path in whole:
        check_folder(path)
    for path in added:
        _check(path, "folder", within=True)
    for place in {*(path.parent for path in (*one_by_one, *whole)), *added}:
        sweep(place)
    outputs = [*one_by_one, *whole, *added]
    for number, path in enumerate(outputs):
        _refuse_over_inputs(path, inputs=[one for one in inputs if one and _exists(one)], whole=path in whole)
        _refuse_over_outputs(path, outputs[:number] + outputs[number + 1 :], whole=path in whole)
    for path, kind in kinds.items():
        _refuse_over_others(path, kind)
        _say_if_called_otherwise(path, kind)


def check_file(path: Path) -> None:
    """Raise unless a file could be written there: BadInputError, ResourceError."""
    _check(path, "regular file")


def check_folder(path: Path) -> None:
    """Raise unless a folder could be written there, in the place of what we wrote: BadInputError, ResourceError."""
    _check(path, "folder")
    _refuse_strangers(path)


def is_among(path: Path, inputs: Iterable[Path | None]) -> bool:
    """Whether a path is one of the inputs, or lies inside one."""
    return any(_same(path, one) or _inside(path, one) for one in inputs if one and _exists(one))


def _refuse_over_inputs(path: Path, inputs: Iterable[Path], *, whole: bool) -> None:
    for one in inputs:
        if _same(path, one):
            raise BadInputError(f"{shown(path, 100)}: is read, and cannot be written to as well; choose another name")
        if _inside(path, one):
            raise BadInputError(
                f"{shown(path, 100)}: lies in {shown(one, 100)}, which is read; choose a place outside of it"
            )
        if whole and _inside(one, path):
            raise BadInputError(
                f"{shown(path, 100)}: is replaced as a whole, but {shown(one, 100)} is read; choose another folder"
            )


def _refuse_over_outputs(path: Path, others: Iterable[Path], *, whole: bool) -> None:
    for one in others:
        if _same(path, one):
            raise BadInputError(f"{shown(path, 100)}: is to be written twice; choose another name for one of them")
        if whole and _inside(one, path):
            raise BadInputError(
                f"{shown(path, 100)}: is replaced as a whole, with {shown(one, 100)} in it; choose another place"
            )


def _refuse_over_others(path: Path, kind: str | None) -> None:
    if is_in_the_way(path, kind):
        raise BadInputError(
            f"{shown(path, 100)}: there is a file that is no {kind or 'output'} of this program's, and that would be lost; "
            "choose another name, or remove it"
        )


def _say_if_called_otherwise(path: Path, kind: str) -> None:
    """By its name other programs would take it for something else."""
    meant = next((other for other, called in SUFFIXES.items() if path.suffix.lower() in called), kind)
    if kind in SUFFIXES and meant != kind:
        logger.warning("%s: %s is written there, though it is called %s", shown(path, 100), kind, path.suffix)


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one place, by whatever names."""
    one, other = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    return one == other or (_exists(one) and _exists(other) and one.samefile(other))


def _inside(path: Path, folder: Path) -> bool:
    return any(_same(parent, folder) for parent in Path(os.path.realpath(path)).parents)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def _check(path: Path, kind: str, *, within: bool = False) -> None:
    """Raise unless `path` could be a new file or folder, or something new stand `within` it."""
    if path.name in ("", "..") or (sys.platform == "win32" and RESERVED.fullmatch(path.name)):
        if not (within and path.is_dir()):
            raise BadInputError(f"{shown(path, 100)}: cannot be the name of a new {kind}; choose another name")
    try:
        if os.path.lexists(path):
            mode = (path.stat() if within else path.lstat()).st_mode
            if not (stat.S_ISDIR(mode) if kind == "folder" else stat.S_ISREG(mode)):
                raise BadInputError(f"{shown(path, 100)}: exists and is not a {kind}; choose another name")
            if kind == "folder" and not within and os.path.ismount(path):
                raise BadInputError(f"{shown(path, 100)}: a disk is mounted there; choose a folder in it")
        _probe(path / "new" if within else path)
    except (OSError, ValueError) as error:
        refused = ResourceError if getattr(error, "errno", None) in NO_ROOM | REFUSED else BadInputError
        why = getattr(error, "strerror", None) or error
        raise refused(f"{shown(path, 100)}: cannot be written ({why})") from error


def _probe(path: Path) -> None:
    """Raise OSError unless there is room for something new of this name; nothing stays, not even its folder."""
    if "\0" in str(path):  # which some calls refuse, and others take for a name that is not there
        raise ValueError("its name holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in str(path)):  # what is no text here, libraries cannot write
        raise ValueError("its name is not in this system's encoding")
    above = path.parent
    while not os.path.lexists(above):
        above = above.parent
    longest = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if any(len(os.fsencode(part)) > longest for part in path.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    with tempfile.TemporaryFile(dir=above) as file:
        file.write(b"\0")
        file.flush()


def _refuse_strangers(folder: Path) -> None:
    if found := strangers(folder) if folder.is_dir() else []:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise BadInputError(
            f"{shown(folder, 100)}: holds {shown(Path(found[0]), 60)}{more}, which this program did not write as it is there, and "
            "which would be lost; choose another folder"
        )


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path for a file; on success it is flushed to disk and takes the name, else it vanishes.

    Raises BadInputError when `path` is something other than a file of the same kind that we wrote, ResourceError when the disk refuses.
    """
    path = Path(path)
    check_file(path)
    with refusals(path), _staging(path.parent) as staging:
        temporary = staging / path.name
        yield temporary
        _refuse_over_others(path, kind_of(temporary))
        _flush(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)


@contextlib.contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it takes the name, at once with everything in it, else it vanishes.

    Raises BadInputError when there is something at `path` that we did not write, ResourceError when the disk refuses.
    """
    path = Path(path)
    check_folder(path)
    with refusals(path), _staging(path.parent) as staging:
        made = staging / path.name
        made.mkdir()
        yield made
        list_files(made)
        for one in made.rglob("*"):
            if one.is_file():
                one.chmod(made.stat().st_mode & 0o666)  # the umask's; libraries make files that only their owner reads
                _flush(one)
        _refuse_strangers(path)
        _take_name(made, path, staging / ASIDE)
        _flush_folder(path.parent)


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Inside, what a disk refuses becomes a ResourceError that names `path`."""
    try:
        yield
    except MixOfShowError:
        raise
    except Exception as error:
        # Libraries in Rust have errors of their own, which end so.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        why = getattr(error, "strerror", None) or error
        raise ResourceError(f"{shown(path, 100)}: could not be written ({why}); nothing was changed") from error


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder in the system's place for temporary files; it vanishes at the end, or is swept by the next run."""
    with _staging(Path(tempfile.gettempdir())) as folder:
        yield folder


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _take_name(made: Path, path: Path, aside: Path) -> None:
    """Give a finished folder its name; what had it is left where `made` was, or in `aside`."""
    try:
        made.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        if not _exchange(made, path):
            aside.mkdir()
            path.rename(aside / path.name)
            try:
                made.rename(path)
            except OSError:
                (aside / path.name).rename(path)
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system cannot."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = [os.fsencode(one.absolute()), os.fsencode(other.absolute())]
    return exchange(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE) == 0


@contextlib.contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """Yield a new hidden folder that only this process uses; it vanishes at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    with contextlib.ExitStack() as stack:
        while True:
            folder = parent / secrets.token_hex(8).join(STAGING)
            folder.mkdir(0o700)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            if stack.enter_context(holding(folder)) is not False and folder.exists():
                break  # else another process has just taken it for stale
        yield folder


def sweep(parent: Path) -> None:
    """Remove what killed processes left, and put back what they were about to replace."""
    for folder in parent.glob("*".join(STAGING)):
        with contextlib.suppress(OSError), holding(folder) as held:
            old = time.time() - folder.stat().st_mtime > STALE_SECONDS
            if held or (held is None and old):
                for one in (folder / ASIDE).glob("*"):
                    if not os.path.lexists(parent / one.name):
                        one.rename(parent / one.name)
                shutil.rmtree(folder, ignore_errors=True)


def restore(path: Path) -> None:
    """Where nothing is at `path`, put back what a process had there that was killed while it replaced it."""
    with contextlib.suppress(OSError, ValueError):
        if not path.exists():
            sweep(path.parent)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[bool | None]:
    """Hold a folder's lock, which ends with the process; yields False if another has it, None where there are none."""
    handle = None
    try:
        if fcntl is None:
            yield None
            return
        try:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held: bool | None = True
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError:
            held = None
        yield held
    finally:
        if handle is not None:
            os.close(handle)


def _flush(path: Path) -> None:
    with path.open("r+b") as file:  # Windows flushes only what may be written to
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if sys.platform == "win32":  # which opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
