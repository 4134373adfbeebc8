"""What made a result is known from it, and the same made twice is the same, byte for byte.

Covers F10, F28 and G8.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixofshow.concepts.manifest import read_manifest
from mixofshow.fusion import store as stores
from mixofshow.fusion.jobs import make_job
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.fusion.store import Store, open_recording

FEW = FusionSettings(steps=1, prompts=("a {}",), refine=0)


def _bytes(folder):
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.fixture
def threads():
    """`threads(2)`: so many compute, until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_second_fusion_from_recordings_writes_the_same_folder(golden_pipeline, golden_concepts, tmp_path):
    for name in "ab":
        fused = fuse(golden_concepts[:1], golden_pipeline, FEW, store=Store(tmp_path / "store"))
        golden_pipeline.tokenizer(["a man"], truncation=True, max_length=len(name) + 9)  # as whoever came before
        fused.model.save(tmp_path / name)
        golden_pipeline.tokenizer("a man", truncation=False)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    tokenizer = json.loads((tmp_path / "a" / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    assert tokenizer["truncation"] is tokenizer["padding"] is None


FUSED = """
import sys
from mixofshow import fuse, load_base
from mixofshow.fusion.settings import FusionSettings
from pathlib import Path
base, out, *files = sys.argv[1:]
fuse(files, load_base(Path(base)), FusionSettings(steps=1, prompts=("a {}",))).model.save(out)
"""


def test_neither_order_nor_the_seed_of_hashes_changes_a_byte(golden_concepts, tmp_path):
    base, files = Path(__file__).parents[1] / "goldens" / "pipeline", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for one, file in zip(golden_concepts, files, strict=True):
        one.save(file)
    for number, order in enumerate((files, files[::-1])):
        arguments = [sys.executable, "-c", FUSED, base, tmp_path / str(number), *order]
        subprocess.run(arguments, check=True, timeout=120, env={**os.environ, "PYTHONHASHSEED": str(number)})
    assert _bytes(tmp_path / "0") == _bytes(tmp_path / "1")


def test_how_many_threads_computed_is_written_down_and_mixing_is_said(
    golden_pipeline, golden_concepts, tmp_path, caplog, threads
):
    store = Store(tmp_path / "store")
    fused = fuse(golden_concepts[:1], golden_pipeline, FEW, store=store)
    assert not caplog.text
    fused.model.save(tmp_path / "f")
    assert read_manifest(tmp_path / "f").threads == 1
    assert {open_recording(path).info.threads for path in store.folder.iterdir()} == {1}
    threads(2)
    stores.tell_of_threads.cache_clear()
    with caplog.at_level(logging.WARNING):
        fuse(golden_concepts[:1], golden_pipeline, FEW, store=store)
        base = golden_pipeline.config["_name_or_path"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mixofshow.fusion.jobs.load_named_base", lambda *_, **__: golden_pipeline)
            make_job([], {}, model=tmp_path / "f", base=base)
    said = [record.getMessage() for record in caplog.records]
    assert [one.split(": ")[1] for one in said] == ["made with 1 threads, now there are 2"] * 2
    assert str(tmp_path / "store") in said[0] and str(tmp_path / "f") in said[1]
