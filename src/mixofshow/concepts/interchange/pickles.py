"""Pickles of other tools, read in a child process that hands back numbers only.

A pickle is a program. torch runs but the few instructions that make tensors (`weights_only`), which has been broken
before; so it does that in a process of its own with a limit of memory and time, and what comes back is safetensors,
checked like any stranger's file. `python -m` this module is that process: pickle in, safetensors out.
"""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from mixofshow.errors import ConceptFileError, ResourceError, shown
from mixofshow.files import MAX_TENSORS, parse_tensors
from mixofshow.processes import limit_memory
from mixofshow.reading import MAX_FILE_BYTES

MEMORY: Final = 2 * 2**30
"""Bytes that the child may take beyond what torch takes when it is imported."""
SECONDS: Final = 60
DEPTH: Final = 4
"""Tables within tables: the deepest known, of Mix-of-Show's own code, are three."""
LONGEST_TEXT: Final = 256
REFUSED: Final = 2
NUMBERING: Final = 5
"""Characters that number the tensors on their way here: safetensors keeps no order, and words have one."""


def read_pickle(data: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and short texts in a pickled table, each by its path in it, as `params/unet/...`.

    Raises ConceptFileError for anything else than tables of tensors, ResourceError when no process can be started.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ConceptFileError(f"{name}: a pickle of {len(data)} bytes, at most {MAX_FILE_BYTES} are read")
    if data.startswith(b"PK"):
        _check_archive(data, name)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mixofshow.concepts.interchange.pickles"],
            input=data,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConceptFileError(f"{name}: a pickle that takes over {SECONDS} seconds to read") from error
    except OSError as error:
        raise ResourceError(f"{name}: no process can be started to read a pickle in ({shown(error)})") from error
    if done.returncode == REFUSED:
        raise ConceptFileError(f"{name}: not read: {shown(done.stdout.decode(errors='replace'), 200)}")
    if done.returncode:
        raise ConceptFileError(f"{name}: a pickle that its reader did not survive (exit code {done.returncode})")
    tensors, texts = parse_tensors(done.stdout, name)
    return {key[NUMBERING:]: tensors[key] for key in sorted(tensors)}, texts


def _check_archive(data: bytes, name: str) -> None:
    """Raise ConceptFileError unless the archive is as torch writes it, nothing compressed, so no larger than it seems."""
    try:
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise ConceptFileError(f"{name}: a damaged archive ({shown(error)})") from error
    if len(entries) > 2 * MAX_TENSORS:
        raise ConceptFileError(f"{name}: an archive of {len(entries)} entries, at most {2 * MAX_TENSORS} are read")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ConceptFileError(f"{name}: a compressed archive, which torch does not write; it is not opened")
    if (total := sum(entry.file_size for entry in entries)) > len(data):
        raise ConceptFileError(f"{name}: an archive that claims {total} bytes in {len(data)}; it is not opened")


class _Parameters:
    """Stands for torch's ParameterDict, of which textual inversion's own code keeps one: its attributes, and no code."""


def _child() -> int:
    """Pickle from standard input, safetensors or a reason to standard output; the exit code says which."""
    data = sys.stdin.buffer.read()
    limit_memory(MEMORY)
    try:
        with torch.serialization.safe_globals([(_Parameters, "torch.nn.modules.container.ParameterDict")]):
            table = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        tensors, texts = _sorted_leaves(table, len(data))
        sys.stdout.buffer.write(safetensors.torch.save(tensors, texts))
    except Exception as error:  # whatever a hostile pickle can provoke
        sys.stdout.write(_reason(error))
        return REFUSED
    return 0


def _sorted_leaves(table: Any, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A table's tensors and texts by path; ValueError for tensors of more numbers than a file of `size` bytes holds."""
    tensors: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    for path, leaf in _leaves(table):
        if isinstance(leaf, str) and len(leaf) <= LONGEST_TEXT:
            texts[path] = leaf
        if isinstance(leaf, Tensor):
            size -= leaf.numel() * leaf.element_size()
            if leaf.layout != torch.strided or leaf.device.type != "cpu" or size < 0:
                raise ValueError(f"tensor '{path}' is none that a file of this size can hold")
            tensors[f"{len(tensors):0{NUMBERING}}{path}"] = leaf.detach().clone(memory_format=torch.contiguous_format)
    if not tensors:
        raise ValueError("a pickle that holds no table of tensors")
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors)} tensors, at most {MAX_TENSORS} are read")
    return tensors, texts


def _leaves(table: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if len(path) > DEPTH:
        raise ValueError("tables nested too deep")
    if isinstance(table, _Parameters):
        table = vars(table).get("_parameters")
    if not isinstance(table, Mapping):
        yield "/".join(path), table
        return
    for key, value in table.items():
        yield from _leaves(value, (*path, str(key)))


def _reason(error: Exception) -> str:
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted:
        return f"this pickle holds more than tensors, it asks for {wanted.group(1)}"
    if isinstance(error, ValueError) and str(error):
        return str(error)
    return f"a pickle that is damaged, too large, or holds more than tensors ({type(error).__name__})"


if __name__ == "__main__":
    sys.exit(_child())
