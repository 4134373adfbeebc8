"""Many concepts recorded side by side: the same numbers as one after another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mixofshow.errors import ConceptFileError, SettingsError
from mixofshow.fusion.settings import RecordingSettings
from mixofshow.fusion.store import Store
from mixofshow.fusion.workers import RecordingJob, record_all

GOLDEN_BASE = str(Path(__file__).parents[1] / "goldens" / "pipeline")
SETTINGS = RecordingSettings(prompts=("a {}",), picture_prompts=("{}",), steps=1)


@pytest.fixture
def files(golden_concepts, tmp_path):
    paths = [tmp_path / f"{concept.info.name}.safetensors" for concept in golden_concepts]
    for concept, path in zip(golden_concepts, paths, strict=True):
        concept.save(path)
    return paths


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_processes_record_what_one_does(files, tmp_path):
    pytest.importorskip("ray")
    here, there = (
        list(record_all(files, RecordingJob(GOLDEN_BASE, SETTINGS, Store(tmp_path / folder)), workers=workers))
        for folder, workers in (("here", 1), ("there", 2))
    )
    assert [made.file.path.name for made in here] == [made.file.path.name for made in there]
    for one, other in zip(here, there, strict=True):
        for name in one.info.rows:
            assert torch.equal(one.statistics(name, "cpu").moments, other.statistics(name, "cpu").moments)


@pytest.mark.parametrize("workers", [1, 2])
def test_files_are_read_before_any_is_recorded(workers, files, tmp_path):
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(ConceptFileError, match="manx"):
        list(record_all(files, RecordingJob(GOLDEN_BASE, SETTINGS, Store(tmp_path / "kept")), workers=workers))
    assert not (tmp_path / "kept").exists()


def test_without_ray_there_is_one_worker(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match="not installed"):
        list(record_all(files, RecordingJob(GOLDEN_BASE, SETTINGS, Store(tmp_path)), workers=2))
