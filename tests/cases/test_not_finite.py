"""Numbers that are not finite are noticed when they arise, and the last good state is kept: case 02, F13."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from mixofshow import cli, load_concept, tune
from mixofshow.errors import BaseModelError, DivergedError
from mixofshow.tuning import losses
from mixofshow.tuning.checkpoints import newest
from mixofshow.tuning.losses import min_snr_weights
from mixofshow.tuning.run import Run
from tests.conftest import pictures_in

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
KEYS = {"name": "thing", "class_word": "man", "steps": 5, "batch_size": 1, "save_every": 1, "tracker": "none"}


@pytest.fixture
def data(tmp_path):
    return pictures_in(tmp_path / "pictures", "red")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_do_not_divide_by_0(prediction):
    scheduler = DDPMScheduler(10, rescale_betas_zero_snr=True, prediction_type=prediction)
    weights = min_snr_weights(scheduler, torch.arange(10), 5.0)
    assert weights.isfinite().all() and float(weights[-1]) == (1.0 if prediction == "epsilon" else 0.0)


def _breaking(monkeypatch, what, step):
    """From step `step` on, the loss, the gradient, or what is trained is not finite."""
    if what == "numbers":
        take = Run._require_finite

        def spoil(run, figures, length):
            if run.step + 1 >= step:
                run.words.moving.data[0, 0, 0] = float("nan")
            take(run, figures, length)

        monkeypatch.setattr(Run, "_require_finite", spoil)
        return
    loss, calls = losses.masked_mse, []

    def spoilt(made, *rest):
        calls.append(made)
        if len(calls) >= step and what == "gradient":
            made.register_hook(lambda gradient: gradient / 0)
        return loss(made, *rest) * (float("nan") if len(calls) >= step and what == "loss" else 1)

    monkeypatch.setattr(losses, "masked_mse", spoilt)


@pytest.mark.parametrize(("what", "said"), [("loss", "the loss"), ("gradient", "the gradient"), ("numbers", "largest")])
def test_the_run_stops_at_the_first_and_keeps_the_last_good_state(
    golden_pipeline, data, tmp_path, monkeypatch, what, said
):
    _breaking(monkeypatch, what, step=3)
    kept = []
    with pytest.raises(DivergedError, match=f"^step 3: .*{said}.* is (nan|inf); training stopped; lower the rates"):
        tune(golden_pipeline, data, **KEYS, folder=tmp_path / "run", stopped=lambda *found: kept.append(found))
    ((concept, step),) = kept
    assert step == concept.info.settings["steps"] == 2
    assert all(tensor.isfinite().all() for tensor in concept.tensors().values())
    checkpoint = torch.load(newest(tmp_path / "run" / "checkpoints"))
    assert checkpoint["step"] == 2 and all(one.isfinite().all() for one in checkpoint["state"]["trained"])


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mixofshow", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_the_command_keeps_the_concept_and_replaces_no_whole_one(data, tmp_path, monkeypatch, capsys):
    """Also G10: a run that was broken off took the place of a finished one."""
    out = tmp_path / "thing.safetensors"
    options = ["--data", data, "--name", "thing", "--class-word", "man", "--base", GOLDEN_BASE, "--out", out]
    options += ["--steps", "4", "--batch-size", "1", "--tracker", "none", "--save-every", "0"]
    _breaking(monkeypatch, "loss", step=3)
    assert _run(monkeypatch, "tune", *options) == 2
    written = capsys.readouterr()
    assert "error: step 3: the loss is nan" in written.err and "2 steps" in written.out
    assert load_concept(out).info.settings["steps"] == 2
    whole = out.read_bytes()
    (tmp_path / "thing" / "checkpoints" / "step-00000002.pt").unlink()
    assert _run(monkeypatch, "tune", *options) == 2
    assert out.read_bytes() == whole


def test_words_that_no_base_would_take_are_noticed(golden_pipeline, data):
    with pytest.raises(DivergedError, match=r"^step \d: the longest word, in usual lengths, is 1\d\d; "):
        tune(golden_pipeline, data, **{**KEYS, "method": "p-plus", "words.rate": 1.0})


def test_a_pictures_latents_are_finite(golden_pipeline, data, monkeypatch):
    bias = golden_pipeline.vae.quant_conv.bias
    monkeypatch.setattr(bias, "data", bias.data / 0)
    with pytest.raises(BaseModelError, match="^0.png: its latents are not finite"):
        tune(golden_pipeline, data, **KEYS)


def test_a_preview_that_fails_costs_no_training(golden_pipeline, data, caplog):
    """F13: a full disk was a traceback."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "000001.png")

    with caplog.at_level(logging.WARNING):
        concept = tune(golden_pipeline, data, **{**KEYS, "steps": 2, "preview_every": 1}, preview=full)
    assert concept.info.settings["steps"] == 2
    assert "no preview of step 1 (000001.png: No space left on device); training goes on" in caplog.text
