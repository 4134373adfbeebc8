"""Recording in many processes on GPUs: each gets one, or an even share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixofshow.errors import SettingsError
from mixofshow.fusion.settings import RecordingSettings
from mixofshow.fusion.store import Store
from mixofshow.fusion.workers import RecordingJob, needs


def job(device):
    return RecordingJob("emojiland", RecordingSettings(), Store(Path("kept")), device)


@pytest.mark.parametrize(("workers", "gpus", "share"), [(2, 2, 1), (2, 8, 1), (3, 2, 1 / 2), (4, 1, 1 / 4)])
def test_a_worker_gets_a_gpu_or_an_even_share_of_one(workers, gpus, share):
    there, own = needs(job("cuda:1"), workers, gpus=gpus)
    assert there.device == "cuda"  # Ray shows it no other
    assert own == {"num_cpus": 1, "num_gpus": share}


def test_a_worker_on_the_cpu_gets_none():
    there, own = needs(job("cpu"), 2, gpus=2)
    assert (there.device, own) == ("cpu", {"num_cpus": 1})


def test_workers_without_gpus_are_told():
    with pytest.raises(SettingsError, match="device 'cuda': Ray knows of no GPU"):
        needs(job("cuda"), 2, gpus=0)
