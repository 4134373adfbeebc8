"""Laws of editing: an edited model is the one that would have been fused so from the start."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.manifest import CONCEPTS, MANIFEST
from mixofshow.errors import BadInputError, BaseModelError, ConceptFileError, SettingsError
from mixofshow.fusion import stages
from mixofshow.fusion.jobs import edited, edited_settings, fused_from, make_job
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.fusion.store import Store

BASE = str(Path(__file__).parents[1] / "goldens" / "pipeline")
QUICK = FusionSettings(refine=0, mode="independent", steps=1, weights={"dogx": 2.0, "manx": 0.5})


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def files(golden_concepts, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    for concept in golden_concepts:
        concept.save(folder / f"{concept.info.name}.safetensors")
    return [folder / f"{concept.info.name}.safetensors" for concept in golden_concepts]


@pytest.fixture(scope="module")
def concepts(files) -> list[Concept]:
    """Those of the files: they are in half precision there."""
    return [load_concept(file) for file in files]


@pytest.fixture(scope="module")
def folder(golden_pipeline, concepts, store, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fused") / "model"
    fuse(concepts, golden_pipeline, QUICK, store=store).model.save(path)
    return path


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """A copy of what editing reads, that a test may damage."""
    shutil.copytree(folder / CONCEPTS, tmp_path / "model" / CONCEPTS)
    shutil.copy(folder / MANIFEST, tmp_path / "model" / MANIFEST)
    return tmp_path / "model"


def test_a_fused_folder_knows_what_it_was_made_from(folder, golden_pipeline, concepts):
    found, settings = fused_from(folder, golden_pipeline)
    assert {one.info.name: one.hash for one in found} == {one.info.name: one.hash for one in concepts}
    assert settings == QUICK


def test_taking_one_out_is_as_if_it_had_never_been_there(folder, golden_pipeline, concepts, store, monkeypatch):
    known, settings = fused_from(folder, golden_pipeline)
    left = edited(known, [], ["manx"])
    # What was recorded of the first is there already: with a shared store nothing is recorded again.
    monkeypatch.setattr(stages, "record", None)
    found = fuse(left, golden_pipeline, edited_settings(settings, {}, left), store=store).model.weights
    alone = FusionSettings(refine=0, mode="independent", steps=1, weights={"dogx": 2.0})
    expected = fuse(concepts[:1], golden_pipeline, alone, store=store).model.weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_adding_one_is_as_if_it_had_always_been_there(golden_pipeline, files, concepts, store, tmp_path):
    alone, given = tmp_path / "alone", QUICK.model_dump() | {"weights": "equal"}
    fuse(concepts[1:], golden_pipeline, FusionSettings(**given), store=store).model.save(alone)
    job = make_job([], {"weights": QUICK.weights}, model=alone, add=files[:1], base=BASE)
    job.pipeline.scheduler = golden_pipeline.scheduler
    found = fuse(job.concepts, job.pipeline, job.settings, store=store).model.weights
    expected = fuse(concepts, golden_pipeline, QUICK, store=store).model.weights
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_one_may_take_the_place_of_another_of_its_name(concepts):
    first, second = concepts
    other = replace(first, embeddings=first.embeddings + 1)
    assert edited(concepts, [other], ["dogx"]) == [second, other]


def test_a_name_that_is_not_there(concepts):
    with pytest.raises(BadInputError, match="'dogy' in this model; did you mean 'dogx'"):
        edited(concepts, [], ["dogy"])


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({}, {"dogx": 2.0}),
        ({"weights": "dogx=3"}, {"dogx": 3.0}),
        ({"weights": "energy"}, "energy"),
        ({"steps": 2}, {"dogx": 2.0}),
    ],
)
def test_weights_stay_for_those_that_stay(given, weights, concepts):
    assert edited_settings(QUICK, given, concepts[:1]).weights == weights


def test_one_is_weighed_anew_and_the_others_are_not(concepts):
    found = edited_settings(QUICK, {"weights": "dogx=1"}, concepts)
    assert found.weights == {"dogx": 1.0, "manx": 0.5}
    with pytest.raises(SettingsError, match="weights"):
        edited_settings(QUICK, {"weights": "dogx=much"}, concepts)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 10_000, '{"words": []}', "\xff"])
def test_a_manifest_that_is_not_ours(text, broken):
    (broken / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConceptFileError, match="concepts.json") as error:
        make_job([], {}, model=broken, base=BASE)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"concepts": 1}, ConceptFileError),
        ({"concepts": []}, ConceptFileError),
        ({"concepts": [{"name": "dogx"}]}, ConceptFileError),
        ({"concepts": [{"name": "dogx", "hash": "0"}]}, ConceptFileError),
        ({"base": 3}, ConceptFileError),
        ({"settings": "gradient"}, ConceptFileError),
        ({"settings": {"stepz": 3}}, SettingsError),
    ],
)
def test_a_damaged_manifest(change, error, broken):
    table = json.loads((broken / MANIFEST).read_text()) | change
    (broken / MANIFEST).write_text(json.dumps(table))
    with pytest.raises(error):
        make_job([], {}, model=broken, base=BASE)


def test_its_concepts_must_be_those_it_names(broken):
    (broken / CONCEPTS / "dogx.safetensors").unlink()
    with pytest.raises(ConceptFileError, match="are not the concepts of"):
        make_job([], {}, model=broken, base=BASE)


def test_the_base_must_be_found_and_be_the_one(broken, folder):
    with pytest.raises(BaseModelError, match="made on base 'pipeline', which is not here"):
        make_job([], {}, model=broken)
    with pytest.raises(ConceptFileError, match="made for base"):
        make_job([], {}, model=broken, base=str(folder))  # fused, so no longer the base
