"""Suites say in which precision their base is loaded."""

from __future__ import annotations

import pytest

from mixofshow.errors import SettingsError
from mixofshow.evaluation import suite
from mixofshow.evaluation.suite import make_suite, run_suite

SUITE = {"concepts": ["clown"], "methods": ["p-plus"]}


class LoadedError(Exception):
    """Told with the options that the base would be loaded with."""


@pytest.mark.parametrize(
    ("said", "given", "expected"),
    [
        ({}, None, {}),
        ({"dtype": "bf16", "variant": "fp16"}, None, {"dtype": "bf16", "variant": "fp16"}),
        ({"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "fp32"}),
    ],
)
def test_a_suites_base_is_loaded_as_it_says_and_as_the_command_says_above_it(
    said, given, expected, tmp_path, monkeypatch
):
    def told(name, device, options):
        raise LoadedError(dict(options))

    monkeypatch.setattr(suite, "BaseSource", told)
    with pytest.raises(LoadedError) as found:
        run_suite(make_suite(SUITE | said), tmp_path / "out", loading=given)
    assert found.value.args == (expected,)


def test_a_precision_that_there_is_not_is_said():
    with pytest.raises(SettingsError, match="dtype"):
        make_suite(SUITE | {"dtype": "fp8"})
