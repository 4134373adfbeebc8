"""What is loaded can be saved, and is the same: B2, B3, B10, B37, B38."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixofshow import MixOfShowPipeline, Region, load_model, load_unfused
from mixofshow.bases.loading import GUIDANCE, fingerprint
from mixofshow.concepts.model import with_concept
from mixofshow.errors import BadInputError, BaseModelError

ASKED = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 3}
BASE = "tests/goldens/pipeline"


@pytest.fixture(scope="module")
def folder(fused, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "fused"
    fused.save(path)
    return path


def picture(model, fused, **asked):
    model.pipeline.scheduler = fused.pipeline.scheduler
    return np.array(MixOfShowPipeline.of(model)("a <dogx> and a <manx>", **(ASKED | asked))[0], dtype=int)


def test_a_pipeline_made_by_its_constructor_is_saved(golden_pipeline, tmp_path):
    """B2: it called itself until the folder's name was too long."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    parts = {name: golden_pipeline.components[name] for name in names}
    MixOfShowPipeline(**parts).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "unet").is_dir()
    assert fingerprint(load_model(tmp_path / "model").pipeline) == fingerprint(golden_pipeline)


def test_a_single_concept_keeps_all_that_is_known(golden_pipeline, golden_concepts, fused, tmp_path, monkeypatch):
    """B3: guidance, class word and concept were gone."""
    monkeypatch.setitem(GUIDANCE, "pipeline", 3.0)
    (concept, _) = golden_concepts
    model = with_concept(golden_pipeline, concept)
    MixOfShowPipeline.of(model).save_pretrained(tmp_path / "one")
    monkeypatch.delitem(GUIDANCE, "pipeline")
    again = load_model(tmp_path / "one")
    assert (again.base, again.usual_guidance) == ("pipeline", 3.0)
    assert again.class_words() == [(concept.info.name, concept.info.words, "object")]
    assert [one.hash for one in again.concepts] == [concept.hash]
    regions = [Region(f"a {concept.prompt}", (0, 0, 32, 48), strength=0.5)]
    asked = {"prompt": "", "regions": regions, "guidance_scale": 3.0, **ASKED}
    again.pipeline.scheduler = golden_pipeline.scheduler
    assert MixOfShowPipeline.of(again)(**asked)[0].tobytes() == MixOfShowPipeline.of(model)(**asked)[0].tobytes()
    assert load_unfused(tmp_path / "one", base=BASE).weights.keys() == concept.deltas.keys()


def test_saving_again_changes_nothing(folder, fused, tmp_path):
    """B10: the concepts were lost, and the table of tokens grew."""
    load_model(folder).save(tmp_path / "second")
    load_model(tmp_path / "second").save(tmp_path / "third")
    for path in sorted(one.relative_to(folder) for one in folder.rglob("*") if one.is_file()):
        if path.suffix == ".safetensors" or path.name == "concepts.json":
            assert (tmp_path / "third" / path).read_bytes() == (folder / path).read_bytes(), path
    again = load_model(tmp_path / "third")
    assert len(again.pipeline.text_encoder.get_input_embeddings().weight) == len(again.pipeline.tokenizer)
    assert np.abs(picture(again, fused) - picture(fused, fused)).max() <= 1


def test_saved_over_itself(folder, fused, tmp_path):
    fused.save(tmp_path / "model")
    load_model(tmp_path / "model").save(tmp_path / "model")
    assert load_model(tmp_path / "model").concept_hashes == fused.concept_hashes
    assert len(load_model(tmp_path / "model").concepts) == 2


def test_a_reloaded_model_has_no_delta(folder, fused, tmp_path):
    """B37: it was empty, and fitted no base."""
    with pytest.raises(BadInputError, match="load_unfused"):
        load_model(folder).save_delta(tmp_path / "delta.safetensors")
    load_unfused(folder, base=BASE).save_delta(tmp_path / "delta.safetensors")
    again = load_model(tmp_path / "delta.safetensors", base=BASE)
    assert np.abs(picture(again, fused) - picture(fused, fused)).max() <= 1


def test_a_fused_model_that_is_not_finite_is_not_taken_apart(fused, tmp_path):
    """F31: with own weights the broken layer was not drawn with, and a picture came out."""
    broken = replace(fused, pipeline=copy.deepcopy(fused.pipeline))
    with torch.no_grad():
        broken.pipeline.unet.conv_out.bias[0] = torch.nan
    broken.save(tmp_path / "broken")
    with pytest.raises(BaseModelError, match="tensor 'conv_out.bias' has numbers that are not finite"):
        load_unfused(tmp_path / "broken", base=BASE)


def test_a_delta_knows_the_class_words(golden_pipeline, golden_concepts, tmp_path):
    """B38."""
    model = with_concept(golden_pipeline, golden_concepts[0])
    model.save_delta(str(tmp_path / "delta.safetensors"))
    again = load_model(tmp_path / "delta.safetensors", base=BASE)
    assert again.class_words() == model.class_words() != []
    assert again.manifest == model.manifest
