"""Laws of a model that knows concepts: its folder gives it back, and plain diffusers reads that folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline

from mixofshow.bases.layers import lora_layers
from mixofshow.concepts.manifest import MANIFEST
from mixofshow.concepts.model import VECTORS, load_model
from mixofshow.concepts.prompts import encode_prompts
from mixofshow.errors import BaseModelError, ConceptFileError, MixOfShowError

PROMPTS = ["a <dogx> and a <manx1>", "photo of a castle"]


@pytest.fixture(scope="module")
def folder(golden_fused, tmp_path_factory):
    path = tmp_path_factory.mktemp("fused") / "model"
    golden_fused.save(path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the folder that a test may damage; big files are links."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in (MANIFEST, VECTORS):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


@torch.no_grad()
def test_save_then_load_gives_the_model(folder, golden_fused):
    found = load_model(folder)
    weights = {name: layer.weight for name, layer in lora_layers(found.pipeline).items()}
    assert all(torch.equal(weights[name], weight) for name, weight in golden_fused.weights.items())
    assert found.vocabulary.aliases == golden_fused.vocabulary.aliases
    assert list(found.vocabulary.embeddings) == list(golden_fused.vocabulary.embeddings)
    with golden_fused.active():
        expected = encode_prompts(golden_fused.pipeline, PROMPTS, golden_fused.vocabulary).hidden
    assert torch.equal(encode_prompts(found.pipeline, PROMPTS, found.vocabulary).hidden, expected)


def test_saving_leaves_the_base_as_it_was(folder, golden_fused):
    assert len(golden_fused.pipeline.tokenizer) == 654
    assert golden_fused.pipeline.text_encoder.get_input_embeddings().num_embeddings == 654


@torch.no_grad()
def test_plain_diffusers_reads_the_folder(folder, golden_fused):
    plain = StableDiffusionPipeline.from_pretrained(folder)
    ids = plain.tokenizer("a <dogx1> and <manx2>").input_ids
    table = plain.text_encoder.get_input_embeddings().weight
    assert [token for token in ids if token > 653] == [654, 657]
    for row, vector in enumerate(golden_fused.vocabulary.embeddings.values()):
        assert torch.equal(table[654 + row], vector.mean(0))


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "null", "{}", "{", "\xff", '{"words": 1}', '{"words": ["<dogx1>"]}', '{"words": [1, 2, 3, 4]}'],
)
def test_broken_manifests(manifest, broken):
    (broken / MANIFEST).write_bytes(manifest.encode("latin-1"))
    with pytest.raises(ConceptFileError, match="concepts") as error:
        load_model(broken)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "aliases", [1, [], {"<a>": 1}, {"<a>": ["<nowhere>"]}, {"cat": ["<dogx1>"]}, {"<dogx1>": ["<dogx2>"]}]
)
def test_broken_aliases(aliases, broken):
    manifest = json.loads((broken / MANIFEST).read_text()) | {"aliases": aliases}
    (broken / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(MixOfShowError, match="concepts|cannot be a placeholder") as error:
        load_model(broken)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("shape", [(15, 32), (16, 31), (32,), (1, 16, 32)])
def test_broken_vectors(shape, broken):
    vectors = safetensors.torch.load((broken / VECTORS).read_bytes())
    (broken / VECTORS).write_bytes(safetensors.torch.save(vectors | {"<dogx1>": torch.zeros(shape)}))
    with pytest.raises(ConceptFileError, match="<dogx1>"):
        load_model(broken)


def test_vectors_that_are_not_finite(broken):
    vectors = safetensors.torch.load((broken / VECTORS).read_bytes())
    (broken / VECTORS).write_bytes(safetensors.torch.save(vectors | {"<dogx1>": torch.full((16, 32), float("nan"))}))
    with pytest.raises(ConceptFileError, match="<dogx1>"):
        load_model(broken)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "../..", "", "a/b/c"])
def test_no_such_model(name):
    with pytest.raises(BaseModelError):
        load_model(name)


def test_a_saved_model_names_no_folder_of_this_machine(golden_fused, tmp_path):
    golden_fused.save(tmp_path / "fused")
    here = str(Path(__file__).parents[1])
    for path in (tmp_path / "fused").rglob("*.json"):
        assert here not in path.read_text(), path
