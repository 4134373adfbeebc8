"""Runs that are broken off: what is lost, and what goes on as if nothing had happened."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mixofshow.concepts.concept import load_concept
from mixofshow.errors import BadInputError, ResourceError, SettingsError
from mixofshow.tuning.settings import printed
from mixofshow.tuning.trainer import tune
from tests.conftest import pictures_in, short_run

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"


@pytest.fixture
def make(tmp_path):
    quick = {"steps": 6, "batch_size": 2, "save_every": 2, "tracker": "none", "pictures.size": 64}
    usual = {"pictures.flip": True, "words.norm_limit": 0.19, "unet.rate": 0.01}
    return short_run(pictures_in(tmp_path / "pictures", "red", "blue", "green", size=(16, 16)), **quick, **usual)


def _stopping(at):
    def progress(step, total, info):
        if step == at:
            raise KeyboardInterrupt

    return progress


VARIANTS = {
    "plain": {},
    "running mean and accumulation": {"optimizer.ema": 0.5, "optimizer.accumulate": 2, "optimizer.warmup": 2},
    "words and captions": {"method": "p-plus", "captions.dropout": 0.5, "captions.templates": "object"},
    "full rank": {"method": "custom-diffusion", "prior.weight": 0.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(golden_pipeline, make, tmp_path, variant):
    settings = make(**VARIANTS[variant])
    straight = tune(settings, golden_pipeline)
    broken = tune(settings, golden_pipeline, folder=tmp_path / "run", progress=_stopping(3))
    assert broken.info.settings["steps"] == 3 and broken.hash != straight.hash
    resumed = tune(settings, golden_pipeline, folder=tmp_path / "run", resume=True)
    assert resumed.hash == straight.hash
    assert resumed.info == straight.info


def test_words_that_stopped_stay_stopped(golden_pipeline, make, tmp_path):
    settings = make(**{"words.norm_limit": 1e-6})
    tune(settings, golden_pipeline, folder=tmp_path / "run", progress=_stopping(2))
    resumed = tune(settings, golden_pipeline, folder=tmp_path / "run", resume=True)
    assert torch.equal(resumed.embeddings, tune(settings, golden_pipeline).embeddings)


def test_another_configuration_or_data_set_is_refused_and_named(golden_pipeline, make, tmp_path):
    tune(make(), golden_pipeline, folder=tmp_path / "run", progress=_stopping(2))
    with pytest.raises(SettingsError, match=r"unet\.rank: 4 -> 8"):
        tune(make(**{"unet.rank": 8}), golden_pipeline, folder=tmp_path / "run", resume=True)
    Image.new("RGB", (16, 16), "yellow").save(tmp_path / "pictures" / "1.png")
    with pytest.raises(SettingsError, match=r"1\.png: changed"):
        tune(make(), golden_pipeline, folder=tmp_path / "run", resume=True)


def test_a_new_run_does_not_mix_with_an_old_one(golden_pipeline, make, tmp_path):
    tune(make(), golden_pipeline, folder=tmp_path / "run", progress=_stopping(2), resume=True)
    with pytest.raises(BadInputError, match="`resume`"):
        tune(make(), golden_pipeline, folder=tmp_path / "run")


def _command(tmp_path, settings, *more):
    (tmp_path / "thing.yaml").write_text(printed(settings))
    out = ["--out", str(tmp_path / "thing.safetensors"), "--device", "cpu"]
    return ["-m", "mixofshow", "tune", str(tmp_path / "thing.yaml"), *out, *more]


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_full_disk_ends_with_3_and_names_the_last_good_checkpoint(make, tmp_path):
    """The limit lets no checkpoint through: the first one that fails is a warning, the second ends the run."""
    settings = make(steps=8)

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    ended = subprocess.run(
        [sys.executable, *_command(tmp_path, settings)],
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=small_disk,
    )
    assert ended.returncode == 3, ended.stderr
    (warning,) = [line for line in ended.stderr.splitlines() if "training goes on" in line]
    last = ended.stderr.splitlines()[-1]
    assert "step-00000002.pt: could not be written" in warning
    assert last.startswith("error: ") and "step-00000004.pt: could not be written" in last
    assert last.endswith("last good checkpoint: none yet")


@pytest.fixture
def disk(monkeypatch):
    """`disk(2, 3)`: full at the second and third checkpoint that is written from now on, and at no other."""
    write = Path.write_bytes

    def full_at(*numbers):
        written = itertools.count(1)

        def write_bytes(path, data):
            if next(written) in numbers:
                write(path, bytes(data[:100]))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    return full_at


def _kept(tmp_path):
    return [int(path.stem.removeprefix("step-")) for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]


@pytest.mark.parametrize(("full", "kept"), [((2,), [2, 6]), ((1, 3), [4])], ids=["once", "twice, not in a row"])
def test_a_checkpoint_that_fails_costs_no_training(golden_pipeline, make, tmp_path, disk, caplog, full, kept):
    settings = make(steps=8)
    straight = tune(settings, golden_pipeline)
    disk(*full)
    with caplog.at_level(logging.WARNING):
        assert tune(settings, golden_pipeline, folder=tmp_path / "run").hash == straight.hash
    assert _kept(tmp_path) == kept
    assert caplog.text.count("No space left on device") == caplog.text.count("training goes on") == len(full)
    assert tune(settings, golden_pipeline, folder=tmp_path / "run", resume=True).hash == straight.hash


def test_two_in_a_row_end_the_run_which_goes_on_from_the_last_good_one(golden_pipeline, make, tmp_path, disk):
    settings = make(steps=8)
    disk(2, 3)
    with pytest.raises(ResourceError, match=r"step-00000006\.pt: could not be .*last good checkpoint: .*00000002\.pt$"):
        tune(settings, golden_pipeline, folder=tmp_path / "run")
    assert _kept(tmp_path) == [2]
    resumed = tune(settings, golden_pipeline, folder=tmp_path / "run", resume=True)
    assert resumed.hash == tune(settings, golden_pipeline).hash


def test_the_checkpoint_of_ctrl_c_is_tried_twice_at_once(golden_pipeline, make, tmp_path, disk):
    settings = make()
    disk(1, 2)  # of step 2, and of step 3 when it is tried first
    stopped = tune(settings, golden_pipeline, folder=tmp_path / "run", progress=_stopping(3))
    assert stopped.info.settings["steps"] == 3 and _kept(tmp_path) == [3]
    disk(1, 2, 3)  # of step 4, and of step 5 both times
    with pytest.raises(ResourceError, match=r"last good checkpoint: .*00000003\.pt$"):
        tune(settings, golden_pipeline, folder=tmp_path / "run", resume=True, progress=_stopping(5))


def test_two_processes_do_what_one_does_with_twice_the_batches(golden_pipeline, make, tmp_path):
    settings = make(steps=4, save_every=0)
    # What `accelerate launch` starts on several GPUs; on CPUs it would want MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, *_command(tmp_path, settings)], env=_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = tune(make(steps=4, **{"optimizer.accumulate": 2}), golden_pipeline)
    two = load_concept(tmp_path / "thing.safetensors")
    assert torch.allclose(one.embeddings, two.embeddings, atol=1e-4)
    for name, delta in one.deltas.items():
        assert torch.allclose(delta.matrix(), two.deltas[name].matrix(), atol=1e-4), name
