"""Files of tensors: written whole or not at all, and checked before anything trusts them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mixofshow.errors import ConceptFileError, shown
from mixofshow.outputs import writing
from mixofshow.reading import opened, parse_json, read_bytes

MAX_BYTES: Final = 8 * 2**30
"""Of a file that is read whole: all of SDXL in half precision is 7 GB, a LoRA of rank 128 up to 0.9 GB."""
MAX_HEADER_BYTES: Final = 8 * 2**20
"""Thumbnails and kohya's counts of tags take a few."""
MAX_TENSORS: Final = 16_384
"""SDXL has 1,050 layers that can be changed, of which an adapter has up to eight tensors each."""
MAX_DIMENSIONS: Final = 4
DTYPES: Final = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Precisions by their names in safetensors files; in these, the last come first."""
PICKLE_MAGICS: Final = (b"PK\x03\x04", b"\x80")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, limit: int | None = MAX_BYTES
) -> None:
    """Write a safetensors file whole or not at all; the same content gives the same bytes.

    The library would hold all of it in memory twice, and writes metadata in a random order; else it is as its own.
    Raises ConceptFileError for what `parse_tensors` would refuse, or what is over `limit` bytes (None: is not read whole).
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-list(DTYPES).index(item[1].dtype), item[0])))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    for what, found, most in (
        ("its header", len(text), MAX_HEADER_BYTES),
        ("tensors", len(tensors), MAX_TENSORS),
        ("bytes", end, limit or end),
    ):
        if found > most:
            raise ConceptFileError(f"{path}: not written: {what}: {found}, at most {most} would be read again")
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            file.write(raw(tensor))


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without copying those of one that lies on the CPU in one piece."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, read whole and checked. Raises ConceptFileError."""
    return parse_tensors(read_bytes(path, MAX_BYTES), str(path))


def is_pickle(data: bytes) -> bool:
    """Whether these are the bytes of a pickle, or of the zip archive that torch makes of one."""
    # A good safetensors file may begin with a pickle's 0x80 too, when that is the low byte of its header's length.
    return data.startswith(PICKLE_MAGICS) and int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES


def parse_tensors(data: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of safetensors bytes, after checking the header by ourselves.

    The library accepts duplicate keys and huge headers and names no file in its messages.
    """
    header = _header(data, name)
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise ConceptFileError(f"{name}: {len(header)} tensors, at most {MAX_TENSORS} are read")
    try:
        tensors = safetensors.torch.load(data)
        return {key: tensors[key] for key in header}, metadata  # the library's own order is a random one
    except (safetensors.SafetensorError, RuntimeError, ValueError, OverflowError, KeyError) as error:
        raise ConceptFileError(f"{name}: not a valid safetensors file ({shown(error)})") from error


class TensorFile:
    """A safetensors file of any size, of which one tensor is read at a time.

    Never mapped into memory: a mapped file that somebody cuts kills the process. Raises ConceptFileError that calls it
    by `name`, or by its path.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)
        try:
            with opened(path, ConceptFileError, self.name) as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(8)
                length = int.from_bytes(start, "little")
                beginning = start + file.read(min(length, MAX_HEADER_BYTES))
        except (OSError, ValueError) as error:
            raise ConceptFileError(f"{self.name}: cannot be read ({getattr(error, 'strerror', error)})") from error
        self._entries = _header(beginning, self.name, size)
        self._start = 8 + length
        self.metadata: dict[str, str] = self._entries.pop("__metadata__", {})

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each tensor's shape."""
        return {name: tuple(entry["shape"]) for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        try:
            begin, end = self._entries[name]["data_offsets"]
            with self.path.open("rb") as file:
                file.seek(self._start + begin)
                data = file.read(end - begin)
            entry = {**self._entries[name], "data_offsets": [0, len(data)]}
            header = json.dumps({name: entry}).encode()
            return safetensors.torch.load(len(header).to_bytes(8, "little") + header + data)[name]
        except (OSError, safetensors.SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ConceptFileError(f"{self.name}: tensor '{shown(name)}' cannot be read ({shown(error)})") from error


def _header(data: bytes, name: str, size: int | None = None) -> dict[str, Any]:
    """The header at the beginning of `data`, checked against the file's `size` in bytes (None: `data` is all of it)."""
    size = len(data) if size is None else size
    if not data:
        raise ConceptFileError(f"{name}: the file is empty")
    if len(data) < 8:
        raise ConceptFileError(f"{name}: too short, found {len(data)} bytes, needs at least 8")
    length = int.from_bytes(data[:8], "little")
    if is_pickle(data):
        raise ConceptFileError(f"{name}: a PyTorch pickle, not safetensors; pickles are never opened")
    if length > MAX_HEADER_BYTES:
        what = "its metadata (a thumbnail, tags) is too large" if 8 + length <= size else "not safetensors"
        raise ConceptFileError(f"{name}: {what}: a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if len(data) < 8 + length:
        raise ConceptFileError(f"{name}: the file is cut: header needs {8 + length} bytes, found {len(data)}")
    header = parse_json(data[8 : 8 + length], f"{name}: header", ConceptFileError)
    if not isinstance(header, dict):
        raise ConceptFileError(f"{name}: header is not a table")
    _check_entries(header, name)
    _check_length(size, 8 + length, header, name)
    return header


def _check_entries(header: dict[str, Any], name: str) -> None:
    """Raise ConceptFileError unless the header tells what a header has to."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConceptFileError(f"{name}: metadata is not a table of texts")
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        shape, offsets = (entry.get(what) if isinstance(entry, dict) else None for what in ("shape", "data_offsets"))
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise ConceptFileError(
                f"{name}: tensor '{shown(key)}' has shape {shown(shape)}, at most {MAX_DIMENSIONS} dimensions are read"
            )
        if not (_are_counts(shape) and isinstance(offsets, list) and len(offsets) == 2 and _are_counts(offsets)):
            raise ConceptFileError(
                f"{name}: not a valid safetensors file (tensor '{shown(key)}' has shape {shown(shape)}, "
                f"lies at {shown(offsets)})"
            )


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _check_length(size: int, start: int, header: dict[str, Any], name: str) -> None:
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    expected = start + max(ends, default=0)
    if size < expected:
        raise ConceptFileError(f"{name}: the file is cut: expected {expected} bytes, found {size}")
    if size > expected:
        raise ConceptFileError(f"{name}: {size - expected} surplus bytes after the last tensor")
