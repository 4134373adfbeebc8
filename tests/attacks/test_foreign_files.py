"""Hostile files in the formats of other tools: only our errors leave `convert`, and nothing in a file is ever run."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.interchange import pickles
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.errors import ConceptFileError, MixOfShowError
from tests.attacks.test_concept_files import Bomb, torch_file

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def nested(depth: int) -> object:
    table: object = torch.zeros(2)
    for _ in range(depth):
        table = {"a": table}
    return table


def circular() -> dict[str, Any]:
    table: dict[str, Any] = {}
    table["a"] = table
    return table


PICKLES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "code": (lambda trace: torch_file({"a": Bomb(trace)}), "more than tensors, it asks for .*system"),
    "code, in the old format": (
        lambda trace: torch_file(Bomb(trace), _use_new_zipfile_serialization=False),
        "more than tensors, it asks for .*system",
    ),
    "a whole model": (lambda trace: torch_file(torch.nn.Linear(2, 2)), "more than tensors, it asks for .*Linear"),
    "cut": (lambda trace: torch_file({"a": torch.zeros(10_000)})[:-2000], "damaged archive"),
    "cut, in the old format": (
        lambda trace: torch_file({"a": torch.zeros(10_000)}, _use_new_zipfile_serialization=False)[:-2000],
        "damaged, too large, or holds more",
    ),
    "one number, many times": (
        lambda trace: torch_file({"emb_params": torch.zeros(1).expand(10**11)}),
        "tensor 'emb_params' is none that a file of this size can hold",
    ),
    "sparse": (lambda trace: torch_file({"a": torch.zeros(2, 2).to_sparse()}), "tensor 'a' is none that"),
    "tables without end": (lambda trace: torch_file(circular()), "nested too deep"),
    "tables too deep": (lambda trace: torch_file(nested(9)), "nested too deep"),
    "no tensors": (lambda trace: torch_file({"epoch": 3}), "not read: a pickle that holds no table of tensors"),
    "numbers alone": (lambda trace: torch_file(torch.zeros(3)), "of width 32, found \\(1, 3\\)"),
    "bytes": (lambda trace: b"\x80\x02" + np.random.default_rng(0).bytes(100), "damaged, too large, or holds more"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles(name, golden_pipeline, tmp_path):
    make, message = PICKLES[name]
    (tmp_path / "evil.pt").write_bytes(make(tmp_path / "ran"))
    with pytest.raises(ConceptFileError, match=message) as error:
        open_concept(tmp_path / "evil.pt", golden_pipeline)
    assert str(error.value).startswith(f"{tmp_path / 'evil.pt'}: ")
    assert str(error.value).isprintable()
    assert not (tmp_path / "ran").exists()


def archive(size: int, compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data/0", b"\0" * size)
    return buffer.getvalue()


def overlapping() -> bytes:
    """Two entries of the archive's index that name the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", b"\0" * 10_000)
        file.filelist.append(file.filelist[0])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive(240 * 10**6, zipfile.ZIP_DEFLATED), "a compressed archive"),
        (overlapping(), "claims 20000 bytes in"),
        (b"PK\x03\x04" + bytes(1000), "a damaged archive"),
    ],
    ids=["240 MB in 234 kB", "overlapping entries", "zeros"],
)
def test_hostile_archives_reach_no_reader(data, message, golden_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(pickles.subprocess, "run", lambda *args, **options: pytest.fail("a reader was started"))
    (tmp_path / "evil.pt").write_bytes(data)
    start = time.monotonic()
    with pytest.raises(ConceptFileError, match=message):
        open_concept(tmp_path / "evil.pt", golden_pipeline)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("command", "message"),
    [("import sys; sys.exit(3)", r"did not survive \(exit code 3\)"), ("while True: pass", "takes over 1 seconds")],
)
def test_a_reader_that_dies_or_hangs(command, message, golden_pipeline, tmp_path, monkeypatch):
    run = pickles.subprocess.run
    monkeypatch.setattr(
        pickles.subprocess, "run", lambda args, **options: run([args[0], "-c", command], **options | {"timeout": 1})
    )
    monkeypatch.setattr(pickles, "SECONDS", 1)
    (tmp_path / "a.pt").write_bytes(torch_file({"emb_params": torch.zeros(1, 32)}))
    with pytest.raises(ConceptFileError, match=message):
        open_concept(tmp_path / "a.pt", golden_pipeline)


# ---- fuzzing: whatever stands in header, metadata and keys, nothing but our errors comes out

KNOWN_KEYS = [
    "lora_embeddings",
    "emb_params",
    "string_to_param/*",
    "new_concept_embedding/<a>",
    "bundle_emb.x.string_to_param.*",
    *(
        prefix + suffix
        for prefix in (TO_K, f"lora_{TO_K.replace('.', '_')}", "lora_te_x", "unet.conv_in", "base_model.model.x")
        for suffix in (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".diff")
    ),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
metadata_tables = st.dictionaries(
    st.sampled_from(["mixofshow", "sha256", "lora_adapter_metadata", "modelspec.trigger_phrase", "ss_tag_frequency"]),
    json_values.map(json.dumps) | st.text(max_size=20),
    max_size=4,
)
shapes = st.sampled_from([(), (1,), (2,), (32,), (2, 32), (4, 32), (24, 4), (4, 32, 1, 1), (2, 16, 32), (0, 4)])
dtypes = st.sampled_from([torch.float16, torch.float32, torch.float64, torch.int8, torch.bool])
tensor_tables = st.dictionaries(
    st.sampled_from(KNOWN_KEYS) | st.text(max_size=10),
    st.tuples(shapes, dtypes, st.sampled_from([0, 1, 1e5])),
    max_size=5,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F16", "F32", "BF16", "F4"]) | json_values,
        "shape": st.lists(st.integers(-1, 2**63), max_size=5) | json_values,
        "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | json_values,
    },
)
headers = st.dictionaries(st.sampled_from([*KNOWN_KEYS, "__metadata__"]) | st.text(max_size=8), entries | json_values)
fuzzing = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def only_our_errors(path: Path, pipeline: Any) -> None:
    for opened in (
        lambda: load_concept(path, pipeline),
        lambda: open_concept(path, pipeline),
        lambda: open_concept(path, pipeline, ImportSettings(words="man")),
    ):
        try:
            opened()
        except MixOfShowError as error:
            assert str(error).isprintable()


@fuzzing
@given(header=headers, body=st.binary(max_size=64))
def test_any_header(header, body, golden_pipeline, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    only_our_errors(tmp_path / "x.safetensors", golden_pipeline)


@fuzzing
@given(table=tensor_tables, metadata=metadata_tables)
def test_any_keys_and_metadata(table, metadata, golden_pipeline, tmp_path):
    tensors = {key: torch.full(shape, value).to(dtype) for key, (shape, dtype, value) in table.items()}
    try:
        data = safetensors.torch.save(tensors, metadata)
    except safetensors.SafetensorError:
        return  # the library writes no such file
    (tmp_path / "x.safetensors").write_bytes(data)
    only_our_errors(tmp_path / "x.safetensors", golden_pipeline)
