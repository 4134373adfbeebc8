"""What is to be fused may stand in files, in a table, or in a model; and what is wrong there is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mixofshow.errors import MixOfShowError, SettingsError
from mixofshow.fusion.jobs import make_job
from mixofshow.fusion.settings import FusionSettings, on_top

BASE = str(Path(__file__).parents[1] / "goldens" / "pipeline")


@pytest.fixture
def folder(golden_concepts, tmp_path) -> Path:
    for concept in golden_concepts:
        concept.save(tmp_path / "files" / f"{concept.info.name}.safetensors")
    return tmp_path


def _written(folder: Path, table: object) -> Path:
    (folder / "fuse.yaml").write_text(yaml.safe_dump(table))
    return folder / "fuse.yaml"


def test_a_table_names_files_from_where_it_is(folder):
    table = {
        "base": BASE,
        "concepts": ["files/dogx.safetensors", "files/manx.safetensors"],
        "steps": 3,
        "options": {"ridge": 0.5, "toward": "base"},
        "weights": {"dogx": 2},
    }
    job = make_job([_written(folder, table)], {"steps": "4", "options": {"ridge": 0.25}})
    assert [concept.info.name for concept in job.concepts] == ["dogx", "manx"]
    assert (job.settings.steps, job.settings.weights) == (4, {"dogx": 2.0})
    assert job.settings.options == {"ridge": 0.25, "toward": "base"}
    plain = [folder / file for file in table["concepts"]]
    assert [one.hash for one in make_job(plain, {}, base=BASE).concepts] == [one.hash for one in job.concepts]


def test_another_method_does_not_inherit_the_options():
    settings = FusionSettings(weights="equal", refine=0, options={"ridge": 0.5})
    assert on_top(settings, {"method": "regmean"}).options == {}
    assert on_top(settings, {"method": "gradient"}).options == {"ridge": 0.5}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "'concepts': expected a list"),
        ({"concepts": []}, "'concepts': expected a list"),
        ({"concepts": "a.safetensors"}, "'concepts': expected a list"),
        ({"concepts": [1]}, "'concepts': expected a list"),
        ({"concepts": ["a"], "base": 3}, "'base': expected"),
        ({"concepts": ["a"], "stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"concepts": ["a"], "options": [1]}, "'options'"),
        ({"concepts": ["a"], "options": {"ridg": 1}}, "did you mean 'ridge'"),
        ({"concepts": ["a"], "method": "gradeint"}, "did you mean 'gradient'"),
        ({"concepts": ["a"], "base": BASE}, "a: cannot be read"),
        ([1], "expected a table"),
    ],
)
def test_tables_that_cannot_be(table, message, folder):
    with pytest.raises(MixOfShowError, match=message) as error:
        make_job([_written(folder, table)], {})
    assert str(error.value).isprintable()


CONCEPTS = Path(__file__).parents[1] / "goldens" / "concepts"


def test_the_reference_implementations_list(folder, golden_pipeline, golden_concepts):
    listed = json.loads((CONCEPTS / "concept_cfg.json").read_text())
    for one in listed:
        one["lora_path"] = str(CONCEPTS.parent / one["lora_path"])
    listed.append({"lora_path": "files/dogx.safetensors", "text_encoder_alpha": 0.5})  # ours, beside the list
    (folder / "concepts.json").write_text(json.dumps(listed))
    job = make_job([folder / "concepts.json"], {"steps": "4"}, base=BASE)
    assert job.settings.steps == 4
    strengths = [(1.0, 1.0), (0.8, 0.9), (1.0, 0.5)]
    for found, golden, (unet, text) in zip(
        job.concepts, (*golden_concepts, golden_concepts[0]), strengths, strict=True
    ):
        assert found.info.words == golden.info.words
        for name, one in golden.deltas.items():
            expected = one.matrix(unet if name.startswith("unet.") else text)
            assert float((found.deltas[name].matrix() - expected).norm() / expected.norm()) < 1e-3  # ours is in fp16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[", "not valid JSON"),
        ("[" * 20_000, "not valid JSON"),
        ("[]", "at least 1"),
        ("{}", "should be a list"),
        ('[{"lora_path": 3}]', "'0.lora_path'"),
        ('[{"lora_path": "a", "unet_alpha": NaN}]', "NaN is no number"),
        ('[{"lora_path": "a", "unet_alpa": 1}]', "unknown key '0.unet_alpa'"),
        ('[{"lora_path": "a", "unet_alpha": -1}]', "'0.unet_alpha'"),
        ('[{"lora_path": "nowhere.pth"}]', "nowhere.pth: cannot be read"),
        (
            '[{"lora_path": "files/dogx.safetensors", "concept_name": "<a> <b>"}]',
            "its words are <dogx1> <dogx2>, not <a>",
        ),
    ],
)
def test_lists_that_cannot_be(text, message, folder):
    (folder / "list.json").write_text(text)
    with pytest.raises(MixOfShowError, match=message) as error:
        make_job([folder / "list.json"], {}, base=BASE)
    assert str(error.value).isprintable()


def test_only_a_fused_model_is_edited(folder):
    file = folder / "files" / "dogx.safetensors"
    with pytest.raises(SettingsError, match="`model`"):
        make_job([], {}, add=[file])
    with pytest.raises(SettingsError, match="`add`"):
        make_job([file], {}, model=folder)


@pytest.mark.parametrize(
    ("text", "weights"),
    [("equal", "equal"), ("energy", "energy"), ("a=2", {"a": 2.0}), ("a=2, b=.5", {"a": 2.0, "b": 0.5})],
)
def test_weights_as_typed(text, weights):
    assert FusionSettings.of({"weights": text}).weights == weights


@pytest.mark.parametrize("text", ["a", "a=0", "a=-1", "a=nan", "a=1,b", "=", 3])
def test_weights_that_cannot_be(text):
    with pytest.raises(SettingsError, match="weights"):
        FusionSettings.of({"weights": text})
