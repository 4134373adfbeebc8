"""What settings were called before is still taken, and what they are called now is said: issue 20 §2."""

from __future__ import annotations

import json
import logging

import pytest

from mixofshow import FusionSettings, cli
from mixofshow.errors import SettingsError
from mixofshow.fusion.jobs import fused_from
from mixofshow.fusion.stages import fuse
from mixofshow.sampling.composition import from_options, make_composition, variations
from mixofshow.sampling.settings import Composition
from mixofshow.terminal import as_options

SAID = "`own_weights`: is called `regional_lora` now"
GONE = "`refine_order`: does nothing any more; leave it out"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_in_python(said):
    assert Composition(prompt="a", own_weights=True).regional_lora
    assert FusionSettings(refine_order="all") == FusionSettings()
    assert said() == [SAID, GONE]


def test_in_a_yaml_once_and_under_options(tmp_path, said):
    (tmp_path / "old.yaml").write_text("prompt: a\nown_weights: true\n")
    assert from_options(tmp_path / "old.yaml", {}).regional_lora
    assert said() == [SAID]
    assert not from_options(tmp_path / "old.yaml", {"regional_lora": False}).regional_lora
    assert [one.regional_lora for _, one in variations(Composition(prompt="a"), "own_weights=yes,no")] == [True, False]


def test_both_names_at_once_are_refused():
    with pytest.raises(SettingsError, match="'own_weights': is called 'regional_lora' now, which is there too"):
        Composition(prompt="a", own_weights=True, regional_lora=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample --own-weights --prompt a --model gone", "--own-weights: is called --regional-lora now"),
        ("fuse gone.safetensors --out out --refine-order all", "--refine-order: does nothing any more"),
    ],
)
def test_as_options_which_no_help_shows(line, message, tmp_path, monkeypatch, capsys, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mixofshow", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "gone" in capsys.readouterr().err
    assert [as_options(line).startswith(message) for line in said()] == [True]
    monkeypatch.setattr("sys.argv", ["mixofshow", line.split()[0], "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert message.split(":")[0] not in capsys.readouterr().out


def test_in_what_was_saved_before_without_a_word(golden_pipeline, golden_concepts, tmp_path, said):
    """A fused folder says all of its settings, and could not be changed any more when one of them was gone."""
    fuse(golden_concepts, golden_pipeline, method="average").model.save(tmp_path / "fused")
    manifest = tmp_path / "fused" / "concepts.json"
    table = json.loads(manifest.read_text())
    table["settings"]["refine_order"] = "stages"
    manifest.write_text(json.dumps(table))
    assert fused_from(tmp_path / "fused")[1] == FusionSettings(method="average")
    assert said() == []
    assert make_composition({"prompt": "a"}) == make_composition(Composition.renamed({"prompt": "a", "own_weights": False}, quiet=True))
