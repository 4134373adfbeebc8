"""Hostile concept files: each is refused in one line that names the file, and none of its content is ever run.

Every file is tried at three doors: `inspect` (and all who load concepts), `convert`, and `fuse`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.interchange.convert import convert
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ConvertSettings
from mixofshow.errors import ConceptFileError, MixOfShowError, TokenError
from mixofshow.files import write_tensors
from mixofshow.fusion import jobs

UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@pytest.fixture(scope="module")
def good(golden_concepts) -> Concept:
    """A concept of two layers."""
    concept = golden_concepts[0]
    return dataclasses.replace(concept, deltas={layer: concept.deltas[layer] for layer in (UNET, TEXT)})


def pack(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, be it a table or text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def convert_door(path: Path, pipeline: Any) -> None:
    target = path.parent / "converted.safetensors"
    try:
        convert(path, target, pipeline, ConvertSettings())
    finally:
        assert not target.exists()


def fuse_door(path: Path, pipeline: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "load_base", lambda *args, **options: pipeline)
        jobs.make_job([path], {})


DOORS: dict[str, Callable[[Path, Any], object]] = {
    "inspect": load_concept,
    "convert": convert_door,
    "fuse": fuse_door,
}


def refused(path: Path, pipeline: Any, error: type[MixOfShowError], message: str, doors: Iterable[str] = DOORS) -> None:
    """Every door must end in exactly this error, at once, in one line that names the file, which stays as it was.

    What `convert` finds wrong may be something else: what is no concept is another tool's file there.
    """
    for door in doors:
        start = time.monotonic()
        with pytest.raises(MixOfShowError, match=None if door == "convert" else message) as raised:
            DOORS[door](path, pipeline)
        line = str(raised.value)
        assert type(raised.value) is error or door == "convert", door
        assert line.startswith(f"{path}: "), door
        assert line.isprintable(), door
        assert len(line) < len(str(path)) + 4000, door
        assert time.monotonic() - start < 2, door


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "the file is empty"),
    "5 bytes": (lambda data: data[:5], "too short, found 5 bytes, needs at least 8"),
    "cut in the header": (lambda data: data[:200], r"cut: header needs \d+ bytes, found 200"),
    "cut in the numbers": (lambda data: data[:-1], r"cut: expected \d+ bytes, found \d+"),
    "one byte more": (lambda data: data + b"\0", "1 surplus bytes after the last tensor"),
    "header length 0": (lambda data: pack(b"", data), "not valid JSON"),
    "header length 2^40": (lambda data: pack(b"{}", length=2**40), "header of 1099511627776 bytes, at most"),
    "header length 2^63": (lambda data: pack(b"{}", length=2**63), "header of 9223372036854775808 bytes, at most"),
    "header over the limit": (
        lambda data: pack(b"{}" + b" " * 2**23),
        r"metadata \(a thumbnail, tags\) is too large: a header of 8388610 bytes",
    ),
    "header of 20000 tensors": (
        lambda data: pack({f"t{k}": entry([0], 0, 0) for k in range(20000)}),
        "20000 tensors, at most 16384",
    ),
    "header of text": (lambda data: pack(b"hello, world"), "not valid JSON"),
    "header of a list": (lambda data: pack([1, 2]), "header is not a table"),
    "header cut off": (lambda data: pack(b'{"a": '), "not valid JSON"),
    "header not UTF-8": (lambda data: pack(b'{"\xff": 1}'), "not valid JSON"),
    "header 100000 deep": (lambda data: pack(b"[" * 100_000), "not valid JSON"),
    "header with a huge number": (lambda data: pack(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "duplicate keys": (
        lambda data: pack(b'{"a":%s,"a":%s}' % ((json.dumps(entry([2], 0, 4)).encode(),) * 2), b"\0" * 4),
        "duplicate key",
    ),
    "duplicate fields": (
        lambda data: pack(b'{"a":{"dtype":"F16","shape":[2],"shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        "duplicate key",
    ),
    "overlap": (
        lambda data: pack({"a": entry([2], 0, 4), "b": entry([2], 2, 6)}, b"\0" * 6),
        "not a valid safetensors",
    ),
    "hole": (lambda data: pack({"a": entry([2], 0, 4), "b": entry([2], 6, 10)}, b"\0" * 10), "not a valid safetensors"),
    "offsets beyond the file": (lambda data: pack({"a": entry([2], 0, 2**62)}, b"\0" * 4), r"cut: expected \d+ bytes"),
    "offsets backwards": (lambda data: pack({"a": entry([2], 4, 0)}, b"\0" * 4), "surplus|not a valid"),
    "offsets negative": (lambda data: pack({"a": entry([2], -4, 0)}), "not a valid safetensors"),
    "offsets missing": (lambda data: pack({"a": {"dtype": "F16", "shape": [0]}}), "not a valid safetensors"),
    "offsets of text": (lambda data: pack({"a": entry([0], "x", "y")}), "not a valid safetensors"),
    "shape that does not match": (lambda data: pack({"a": entry([3], 0, 4)}, b"\0" * 4), "not a valid safetensors"),
    "shape of 2^62": (lambda data: pack({"a": entry([2**62, 4], 0, 4)}, b"\0" * 4), "not a valid safetensors"),
    "shape of 2^80": (lambda data: pack({"a": entry([2**80], 0, 4)}, b"\0" * 4), "not a valid safetensors"),
    "shape negative": (lambda data: pack({"a": entry([-2], 0, 4)}, b"\0" * 4), "not a valid safetensors"),
    "shape of text": (lambda data: pack({"a": entry(["x"], 0, 4)}, b"\0" * 4), "not a valid safetensors"),
    "shape of 1001 dimensions": (lambda data: pack({"a": entry([1] * 1001, 0, 2)}, b"\0" * 2), "at most 4 dimensions"),
    "unknown dtype": (lambda data: pack({"a": entry([2], 0, 4, "F99")}, b"\0" * 4), "not a valid safetensors"),
    "entry of text": (lambda data: pack({"a": "x"}), "at most 4 dimensions"),
    "no metadata": (lambda data: pack({"a": entry([2], 0, 4)}, b"\0" * 4), "not a mixofshow concept"),
    "metadata of numbers": (lambda data: pack({"__metadata__": {"a": 1}}), "metadata is not a table of texts"),
    "metadata of a list": (lambda data: pack({"__metadata__": ["a"]}), "metadata is not a table of texts"),
    "metadata of 10 MB": (
        lambda data: pack({"__metadata__": {"mixofshow": "x" * 10**7}}),
        "header of 10000035 bytes, at most",
    ),
    "metadata over its limit": (
        lambda data: pack({"__metadata__": {"mixofshow": "x" * 20_000}}),
        "metadata of 20000 characters",
    ),
} | {
    f"dtype {dtype}": (
        lambda data, dtype=dtype, bits=bits: pack({"a": entry([8], 0, bits, dtype)}, b"\0" * bits),
        "not a",
    )
    for dtype, bits in {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F8_E8M0": 8,
        "F8_E5M2": 8,
        "BOOL": 8,
        "U16": 16,
        "C64": 64,
    }.items()
}


@pytest.mark.parametrize("name", BYTES)
def test_hostile_bytes(name, good, golden_pipeline, tmp_path):
    path = tmp_path / "evil.safetensors"
    good.save(path)
    make, message = BYTES[name]
    path.write_bytes(make(path.read_bytes()))
    refused(path, golden_pipeline, ConceptFileError, message)


INFO: dict[str, tuple[Any, str]] = {
    "missing name": ({"name": ...}, "'name'"),
    "name with a path": ({"name": "../../etc/passwd"}, "'name'"),
    "name with a line break": ({"name": "dog\n"}, "'name'"),
    "unknown field": ({"path\n\x1b[31m": "/home/alice"}, "unknown key"),
    "words of another type": ({"words": "<a>"}, "'words'"),
    "no words": ({"words": []}, "'words'"),
    "76 words": ({"words": [f"<a{k}>" for k in range(76)]}, "'words'"),
    "layers of text": ({"layers": "many"}, "'layers'"),
    "10^9 layers": ({"layers": 10**9}, "'layers'"),
    "nested settings": ({"settings": {"a": {"b": 1}}}, "'settings"),
    "a newer format": ({"format_version": 3}, "made in format 3, this version reads <= 2"),
    "a format of text": ({"format_version": "x\ny"}, "made in format"),
    "no format": ({"format_version": ...}, "format_version"),
    "a lone surrogate": ({"class_word": "\ud800"}, "class_word|metadata"),
    "another word": ({"words": ["<dogx1>", "<catx2>"]}, "damaged"),
    "another class word": ({"class_word": "cat"}, "damaged"),
}


@pytest.mark.parametrize("name", INFO)
def test_hostile_metadata(name, good, golden_pipeline, tmp_path):
    changes, message = INFO[name]
    path = tmp_path / "evil.safetensors"
    good.save(path)
    header, body = unpack(path.read_bytes())
    info = json.loads(header["__metadata__"]["mixofshow"]) | changes
    header["__metadata__"]["mixofshow"] = json.dumps({key: value for key, value in info.items() if value is not ...})
    path.write_bytes(pack(header, body))
    refused(path, golden_pipeline, ConceptFileError, message)


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "null", "1", '"x"', "[" * 10_000, '{"format_version": 1, "format_version": NaN}']
)
def test_metadata_that_is_no_table(text, good, golden_pipeline, tmp_path):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(pack({"__metadata__": {"mixofshow": text}}))
    refused(
        path,
        golden_pipeline,
        ConceptFileError,
        "metadata is not the expected table|metadata: not valid JSON|made in format",
    )


@pytest.mark.parametrize(
    "key",
    [
        "../../etc/passwd",
        "a\0b",
        "unet.\u202egnp.exe",
        "n" * 10_000,
        "\ud800",
        "",
        "__class__",
        "lora_embeddings2",
        "\x1b[2J",
        "line\nbreak" + DOWN,
    ],
)
def test_hostile_tensor_names(key, good, golden_pipeline, tmp_path):
    path = tmp_path / "evil.safetensors"
    good.save(path)
    header, body = unpack(path.read_bytes())
    header[key] = entry([2], len(body), len(body) + 4)
    path.write_bytes(pack(header, body + b"\0" * 4))
    refused(path, golden_pipeline, ConceptFileError, "is not known|stands alone|not a valid safetensors|not valid JSON")


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 10**7)
    return buffer.getvalue()


def torch_file(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["concept.pt", "concept.pth", "concept.safetensors"])
@pytest.mark.parametrize(
    "make",
    [
        lambda bomb: torch_file({"params": torch.zeros(3)}),
        torch_file,
        lambda bomb: torch_file(bomb, _use_new_zipfile_serialization=False),
        pickle.dumps,
        lambda bomb: zip_bomb(),
    ],
    ids=["torch", "torch with code", "old torch with code", "pickle with code", "zip bomb"],
)
def test_pickles_are_never_opened(make, name, golden_pipeline, tmp_path):
    sentinel = tmp_path / "ran"
    (tmp_path / name).write_bytes(make(Bomb(sentinel)))
    refused(
        tmp_path / name,
        golden_pipeline,
        ConceptFileError,
        "a PyTorch pickle, not safetensors; pickles are never opened",
        doors=("inspect", "fuse"),
    )
    assert not sentinel.exists()


def changed(good: Concept, tensors: dict[str, torch.Tensor | None]) -> Concept:
    """The concept with other tensors under a correct digest; None drops one."""

    class Hostile(Concept):
        def save(self, path: Path) -> None:
            write_tensors(path, self.tensors(), self.metadata())  # without looking at what it writes

        def tensors(self) -> dict[str, torch.Tensor]:
            return {name: tensor for name, tensor in (super().tensors() | tensors).items() if tensor is not None}

    return Hostile(good.info, good.embeddings, good.deltas)


def one_value(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor[1, 2] = value
    return tensor.to(dtype)


def pair(
    layer: str, down: tuple[int, ...], up: tuple[int, ...], dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor | None]:
    return {layer + DOWN: torch.zeros(down, dtype=dtype), layer + UP: torch.zeros(up, dtype=dtype)}


TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "NaN": (
        {UNET + DOWN: one_value((4, 32), float("nan"))},
        r"to_k.lora_A.weight': 1 values are not finite .* first at \(1, 2\)",
    ),
    "Inf": ({UNET + DOWN: one_value((4, 32), float("inf"))}, r"first at \(1, 2\)"),
    "-Inf in fp32": ({UNET + DOWN: one_value((4, 32), -float("inf"), torch.float32)}, r"first at \(1, 2\)"),
    "over fp16": ({UNET + DOWN: one_value((4, 32), 1e20, torch.float32)}, r"over 10000, the first at \(1, 2\)"),
    "NaN embedding": (
        {"lora_embeddings": torch.full((2, 16, 32), float("nan"), dtype=torch.float16)},
        "'lora_embeddings': 1024 values",
    ),
    "long embedding": (
        {"lora_embeddings": torch.full((2, 16, 32), 100.0, dtype=torch.float16)},
        "'lora_embeddings': length 566, the base's words",
    ),
    "no embeddings": ({"lora_embeddings": None}, "'lora_embeddings': expected"),
    "flat embeddings": ({"lora_embeddings": torch.zeros(32, dtype=torch.float16)}, "'lora_embeddings': expected"),
    "three embeddings for two words": (
        {"lora_embeddings": torch.zeros(3, 16, 32, dtype=torch.float16)},
        r"'lora_embeddings': expected \(2 words, 16 layers, dim\), found \(3",
    ),
    "15 layers": ({"lora_embeddings": torch.zeros(2, 15, 32, dtype=torch.float16)}, r"found \(2, 15, 32\)"),
    "17 layers": ({"lora_embeddings": torch.zeros(2, 17, 32, dtype=torch.float16)}, r"found \(2, 17, 32\)"),
    "31 wide": (
        {"lora_embeddings": torch.zeros(2, 16, 31, dtype=torch.float16)},
        r"16 layers of width 32, found \(16, 31\)",
    ),
    "0 wide": (
        {"lora_embeddings": torch.zeros(2, 16, 0, dtype=torch.float16)},
        r"16 layers of width 32, found \(16, 0\)",
    ),
    "down without up": ({UNET + UP: None}, "to_k.lora_A.weight' stands alone"),
    "up without down": ({TEXT + DOWN: None}, "q_proj.lora_B.weight' stands alone"),
    "ranks 4 and 8": (pair(UNET, (4, 32), (24, 8)), r"down \(4, 32\) and up \(24, 8\) do not fit"),
    "rank 0": (pair(UNET, (0, 32), (24, 0)), r"down \(0, 32\) and up \(24, 0\) do not fit"),
    "rank over the layer's own": (pair(UNET, (25, 32), (24, 25)), "rank 25 is more than the layer's own 24"),
    "int8": (pair(UNET, (4, 32), (24, 4), torch.int8), "expected fp16, bf16 or fp32, found torch.int8"),
    "float64": (pair(UNET, (4, 32), (24, 4), torch.float64), "found torch.float64"),
    "convolution for linear": (pair(UNET, (4, 32, 1, 1), (24, 4, 1, 1)), r"expected \(4, 32\), found \(4, 32, 1, 1\)"),
    "another input size": (pair(UNET, (4, 64), (24, 4)), r"expected \(out, in\) = \(24, 32\), found \(24, 64\)"),
    "another output size": (pair(UNET, (4, 32), (23, 4)), r"expected \(out, in\) = \(24, 32\), found \(23, 32\)"),
    "a layer of no base": (pair("unet.nowhere", (4, 32), (24, 4)), "layer 'unet.nowhere' is not in this base"),
    "a layer without part": (pair("nowhere\n", (4, 32), (24, 4)), r"layer 'nowhere\\n' is not in this base"),
    "a layer without a matrix": (
        pair("unet.conv_norm_out", (4, 32), (24, 4)),
        "layer 'unet.conv_norm_out' is not in this base",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_tensors(name, good, golden_pipeline, tmp_path):
    tensors, message = TENSORS[name]
    changed(good, tensors).save(tmp_path / "evil.safetensors")
    refused(tmp_path / "evil.safetensors", golden_pipeline, ConceptFileError, message)


def test_problems_are_counted_and_the_first_are_listed(good, golden_pipeline, tmp_path):
    path = tmp_path / "evil.safetensors"
    many = {f"unet.layer{k}{half}": torch.zeros(2, 2, dtype=torch.float16) for k in range(30) for half in (DOWN, UP)}
    changed(good, pair(UNET, (4, 5), (6, 4)) | pair(TEXT, (4, 7), (8, 4))).save(path)
    refused(path, golden_pipeline, ConceptFileError, r"found \(8, 7\); .*found \(6, 5\)$")
    changed(good, many).save(path)
    refused(path, golden_pipeline, ConceptFileError, "^(?:[^;]*;){3} and 27 more$")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "family",
            "stable-diffusion-xl",
            "made for a base of family 'stable-diffusion-xl', this one is 'stable-diffusion'",
        ),
        ("family", "x\ny\x1b[31m" * 50, r"made for a base of family 'x\\ny"),
        ("base_fingerprint", "0" * 16, r"made for base 'golden' \(0000000000000000\), this base is [0-9a-f]{16}"),
        ("base_fingerprint", "\n" * 1000, "made for base 'golden'"),
        ("words", ("<dogx1>", "<dogx1>"), "twice"),
    ],
)
def test_another_base(field, value, message, good, golden_pipeline, tmp_path):
    other = dataclasses.replace(good, info=good.info.model_copy(update={field: value}))
    changed(other, {}).save(tmp_path / "evil.safetensors")
    error = TokenError if field == "words" else ConceptFileError
    refused(tmp_path / "evil.safetensors", golden_pipeline, error, message)


@pytest.mark.parametrize(
    "word",
    [
        "<|endoftext|>",
        "<|startoftext|>",
        "cat",
        "a photo of",
        " ",
        "",
        "\n",
        "</w>",
        "<a b>",
        "<>",
        "<V1>",
        "<v1>\n",
        "<ｖ1>",
        "<v\u0435>",
        "<a\0>",
        "<a\u200b>",
        "<" + "a" * 33 + ">",
        "<" + "a" * 10_000 + ">",
        "< a>",
        "<-a>",
    ],
)
def test_words_that_would_take_over_the_tokenizer(word, good, golden_pipeline, tmp_path):
    tokens, table = len(golden_pipeline.tokenizer), golden_pipeline.text_encoder.get_input_embeddings().weight.clone()
    other = dataclasses.replace(good, info=good.info.model_copy(update={"words": (word, "<dogx2>")}))
    changed(other, {}).save(tmp_path / "evil.safetensors")
    refused(tmp_path / "evil.safetensors", golden_pipeline, TokenError, "cannot be a placeholder")
    assert len(golden_pipeline.tokenizer) == tokens
    assert torch.equal(golden_pipeline.text_encoder.get_input_embeddings().weight, table)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.name),
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
    ],
    ids=["missing", "folder", "dangling link", "link to itself", "pipe", "device"],
)
def test_paths_that_are_no_files(make, golden_pipeline, tmp_path):
    path = tmp_path / "evil.safetensors"
    make(path)
    refused(path, golden_pipeline, ConceptFileError, "not a regular file|cannot be read")


@pytest.mark.parametrize("path", ["", "a\0b", "n" * 5000])
def test_paths_that_cannot_be(path, golden_pipeline):
    with pytest.raises(ConceptFileError):
        load_concept(path, golden_pipeline)


def test_a_file_over_the_limit_is_not_read(golden_pipeline, tmp_path):
    path = tmp_path / "evil.safetensors"
    with path.open("wb") as sparse:
        sparse.truncate(2**40)
    refused(path, golden_pipeline, ConceptFileError, "1099511627776 bytes, at most 8589934592 are read")


def test_a_file_of_another_tool_is_not_a_concept(good, golden_pipeline, tmp_path):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(safetensors.torch.save(good.tensors()))
    refused(path, golden_pipeline, ConceptFileError, "not a mixofshow concept")


def test_a_file_that_changes_once_it_is_read_changes_nothing(good, golden_pipeline, tmp_path):
    path = tmp_path / "good.safetensors"
    good.save(path)
    concept, imported = load_concept(path, golden_pipeline), open_concept(path, golden_pipeline)
    with path.open("r+b") as file:
        file.write(b"\xff" * 5000)
        file.truncate(5000)
    assert concept.hash == imported.hash == good.hash


def test_random_bytes(golden_pipeline, tmp_path):
    path, chance = tmp_path / "evil.safetensors", np.random.default_rng(0)
    for length in range(1, 100):
        path.write_bytes(chance.bytes(length))
        with pytest.raises(ConceptFileError, match="evil.safetensors: "):
            load_concept(path, golden_pipeline)
        path.write_bytes(pack(chance.bytes(length)))
        with pytest.raises(ConceptFileError, match="evil.safetensors: "):
            load_concept(path, golden_pipeline)
