"""All settings are checked when they are made, and say what is wrong in one line, whoever makes them: B40."""

from __future__ import annotations

import copy
import pickle

import pytest

from mixofshow import FusionSettings, TuningSettings, make_settings
from mixofshow.concepts.interchange.settings import ConvertSettings
from mixofshow.errors import SettingsError
from mixofshow.fusion.settings import RecordingSettings
from mixofshow.sampling.settings import Composition, SamplingSettings

NEEDED = {"name": "cat", "data": "pictures", "class_word": "cat"}


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (TuningSettings, {**NEEDED, "stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
        (TuningSettings, {**NEEDED, "unet": {"rnak": 3}}, "unknown key 'unet.rnak'; did you mean 'unet.rank'"),
        (TuningSettings, {**NEEDED, "steps": "many"}, "'steps': .*found many"),
        (TuningSettings, {**NEEDED, "name": "a b"}, "'name': expected at most 31 of a-z, 0-9, _ and -, .*found a b"),
        (ConvertSettings, {"name": "A"}, "'name': expected at most 30 of a-z, 0-9, _ and -, of which the first is a letter"),
        (FusionSettings, {"stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
        (FusionSettings, {"method": "nonsense"}, "unknown fusion method 'nonsense'; known are gradient, "),
        (FusionSettings, {"method": "averge"}, "did you mean 'average'"),
        (RecordingSettings, {"steps": 0}, "'steps': .*found 0"),
        (SamplingSettings, {"num_inference_stepz": 3}, "did you mean 'num_inference_steps'"),
        (Composition, {"prompt": "", "regions": [{"prompt": "", "bxo": 1}]}, "unknown key 'regions.0.bxo'"),
        (ConvertSettings, {"rnk": 1}, "did you mean 'rank'"),
    ],
)
def test_an_error_is_ours_and_one_line(kind, given, message):
    for make in (lambda: kind(**given), lambda: kind.model_validate(given)):
        with pytest.raises(SettingsError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    with pytest.raises(SettingsError, match=f"^a.yaml: .*{message}"):
        kind.of(given, "a.yaml")


def test_good_ones_are_as_ever():
    made = make_settings({**NEEDED, "unet.rank": 8})
    assert made == TuningSettings(**NEEDED, unet={"rank": 8})
    assert made.model_fields_set == {*NEEDED, "unet"}
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made.model_copy() == made
    assert FusionSettings.of({"method": "average"}) == FusionSettings(method="average")


@pytest.mark.parametrize("isolate", [None, "now and then", [1], -1])
def test_a_value_that_may_be_of_two_kinds_and_is_of_neither(isolate):
    """It was a traceback: the kinds were taken for the keys of a list's entry."""
    with pytest.raises(SettingsError, match="'isolate"):
        Composition.of({"prompt": "a cat", "isolate": isolate})
