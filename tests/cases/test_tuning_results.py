"""What silently made another result of tuning than was asked for: B11, B16, B17, B20, B27, B31, B33, B34."""

from __future__ import annotations

import pytest
from PIL import Image

from mixofshow import make_settings, tune
from mixofshow.errors import SettingsError
from mixofshow.tuning.settings import TuningSettings, with_presets

QUICK = {"steps": 1, "batch_size": 1, "pictures.size": 64}


@pytest.fixture
def data(tmp_path):
    """A folder of one picture."""
    (tmp_path / "thing").mkdir()
    Image.new("RGB", (20, 16), "red").save(tmp_path / "thing" / "1.png")
    return tmp_path / "thing"


@pytest.mark.parametrize("base", [None, "emojiland"])
def test_rates_and_the_bases_name_are_those_of_the_pipeline(golden_pipeline, data, base):
    """B16: Emojiland's rates were given to every base, by `make_settings` though not by `TuningSettings`."""
    table = {"name": "thing", "class_word": "man", "data": data, **({"base": base} if base else {})}
    for settings in (make_settings({**table, **QUICK}), make_settings(table).model_copy(update={"steps": 1})):
        info = tune(settings, golden_pipeline).info
        assert info.base == "pipeline"  # the golden base's folder
        assert [info.settings[f"{one}.rate"] for one in ("words", "text_encoder", "unet")] == [1e-3, 1e-5, 1e-4]


def test_presets_lie_below_what_was_given():
    given = {"name": "thing", "class_word": "dog", "data": "x", "unet.rate": 0.5, "method": "p-plus", "steps": 1000}
    for settings in (make_settings(given), TuningSettings(**{k: v for k, v in given.items() if k != "unet.rate"})):
        found = with_presets(settings, "emojiland")
        assert (found.steps, found.text_encoder.rate, found.words.norm_limit) == (1000, 3e-4, 1e4)
        assert with_presets(settings, "other").text_encoder.rate == 1e-5
    assert with_presets(make_settings(given), "emojiland").unet.rate == 0.5


def test_tune_is_called_with_settings_or_without(golden_pipeline, data):
    keys = {"name": "thing", "class_word": "man", **QUICK}
    expected = tune(make_settings({**keys, "data": data}), golden_pipeline).hash
    assert tune(golden_pipeline, data, **keys).hash == expected
    assert tune(golden_pipeline, data=str(data), **keys).hash == expected
    with pytest.raises(SettingsError, match="unknown key 'stepz'; did you mean 'steps'"):
        tune(golden_pipeline, data, name="thing", class_word="man", stepz=3)
    with pytest.raises(SettingsError, match="tune: steps beside settings"):
        tune(make_settings({**keys, "data": data}), golden_pipeline, steps=3)


def test_a_base_that_diffusers_loaded_leaves_no_path_in_the_file(golden_pipeline, data, monkeypatch):
    monkeypatch.setattr(golden_pipeline, "_internal_dict", {**golden_pipeline.config, "_name_or_path": "/home/me/mine"})
    assert tune(golden_pipeline, data, name="thing", class_word="man", **QUICK).info.base == "mine"
