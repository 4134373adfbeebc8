"""Base models that are missing, cut or incomplete: one line that names the folder, at once, and nothing is fetched."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixofshow.bases.loading import load_base
from mixofshow.errors import BaseModelError

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
UNET = "unet/diffusion_pytorch_model.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


FAULTS: dict[str, Callable[[Path], None]] = {
    "a cut file of the UNet": lambda base: cut(base / UNET),
    "a cut file of the text encoder": lambda base: cut(base / "text_encoder" / "model.safetensors"),
    "an empty file": lambda base: (base / UNET).write_bytes(b""),
    "no weights": lambda base: (base / UNET).unlink(),
    "no part": lambda base: shutil.rmtree(base / "vae"),
    "no configuration": lambda base: (base / "unet" / "config.json").unlink(),
    "a configuration of text": lambda base: (base / "unet" / "config.json").write_text("hello"),
    "an index of text": lambda base: (base / "model_index.json").write_text("hello"),
    "no index": lambda base: (base / "model_index.json").unlink(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_folder(name, tmp_path):
    shutil.copytree(GOLDEN_BASE, tmp_path / "base")
    FAULTS[name](tmp_path / "base")
    with pytest.raises(BaseModelError, match="base") as error:
        load_base(tmp_path / "base")
    assert str(error.value).startswith(f"{tmp_path / 'base'}: ")
    assert "\n" not in str(error.value)


def test_a_hub_name_that_is_not_in_the_cache_fails_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(
        BaseModelError,
        match="nobody/nothing-of-this-name: not in the local cache, or not whole; `download` fetches it$",
    ):
        load_base("nobody/nothing-of-this-name")
    assert time.monotonic() - start < 10
