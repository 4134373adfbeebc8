"""Laws of delta files: put on the base again they give the model back, and nothing hostile gets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mixofshow.bases.layers import layer, matrix
from mixofshow.concepts.concept import DELTA_KEY, load_concept
from mixofshow.concepts.delta import _digest as digest
from mixofshow.concepts.delta import compressed
from mixofshow.concepts.model import load_model, with_concept
from mixofshow.errors import BaseModelError, ConceptFileError, MixOfShowError, SettingsError, TokenError
from mixofshow.sampling.pipeline import MixOfShowPipeline

BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
FULL, DOWN, UP = LAYER + ".diff", LAYER + ".lora_A.weight", LAYER + ".lora_B.weight"


@pytest.fixture(scope="module")
def file(golden_fused, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "fused.safetensors"
    golden_fused.save_delta(path)
    return path


def test_in_full_it_gives_the_model_back(file, golden_fused):
    found = load_model(file, base=BASE)
    assert found.weights.keys() == golden_fused.weights.keys()
    for name, weight in golden_fused.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-6)
    assert found.vocabulary.aliases == golden_fused.vocabulary.aliases
    for word, vectors in golden_fused.vocabulary.embeddings.items():
        assert torch.equal(found.vocabulary.embeddings[word], vectors)


def test_in_full_it_draws_the_same_picture(file, golden_fused):
    asked = {"width": 64, "height": 64, "seed": 3, "num_inference_steps": 2}
    found = load_model(file, base=BASE)
    found.pipeline.scheduler = golden_fused.pipeline.scheduler
    (expected,), (picture,) = (
        MixOfShowPipeline.of(one)("a <dogx> on a <manx>", **asked) for one in (golden_fused, found)
    )
    differences = (abs(a - b) for a, b in zip(expected.tobytes(), picture.tobytes(), strict=True))
    assert max(differences) <= 1


def test_the_same_model_gives_the_same_bytes(file, golden_fused, tmp_path):
    golden_fused.save_delta(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_rank_that_is_enough_loses_nothing(golden_pipeline, golden_concepts, tmp_path):
    model = with_concept(golden_pipeline, golden_concepts[0])
    lost = model.save_delta(tmp_path / "a.safetensors", rank=4)
    assert lost.overall <= lost.worst <= 1e-5
    assert DOWN in safetensors.torch.load_file(tmp_path / "a.safetensors")
    found = load_model(tmp_path / "a.safetensors", base=BASE)
    for name, weight in model.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-6)


def test_what_a_rank_loses_is_what_is_said(golden_pipeline, golden_fused, tmp_path):
    lost = golden_fused.save_delta(tmp_path / "a.safetensors", rank=1)
    found = load_model(tmp_path / "a.safetensors", base=BASE)
    base = {name: matrix(layer(golden_pipeline, name)) for name in golden_fused.weights}
    left = {name: (found.weights[name] - weight).norm() for name, weight in golden_fused.weights.items()}
    wanted = {name: (weight - base[name]).norm() for name, weight in golden_fused.weights.items()}
    assert lost.overall == pytest.approx(float(_norm(left) / _norm(wanted)), rel=1e-3)
    assert lost.worst == pytest.approx(float(left[lost.layer] / wanted[lost.layer]), rel=1e-3)
    assert lost.worst == pytest.approx(max(float(left[name] / wanted[name]) for name in left), rel=1e-3)


def _norm(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts.values())).norm()


def test_factors_are_kept_only_where_they_are_smaller():
    changes = {"wide": torch.randn(8, 90), "small": torch.randn(6, 6)}
    kept, lost = compressed(changes.items(), rank=3)
    assert {name: type(one).__name__ for name, one in kept.items()} == {"wide": "LowRank", "small": "Full"}
    assert lost.layer == "wide"
    with pytest.raises(SettingsError, match="at least 1"):
        compressed(changes.items(), rank=0)


def test_no_change_at_all():
    assert compressed({"still": torch.zeros(8, 90)}.items(), rank=3)[1].worst == 0
    assert compressed({}.items())[1].overall == 0


BYTES = {
    "empty": (lambda data: b"", "empty"),
    "cut": (lambda data: data[:-1], "cut"),
    "a header only": (lambda data: data[:100], "cut"),
    "surplus": (lambda data: data + b"\0", "surplus"),
    "another number": (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "damaged"),
    "a pickle": (lambda data: b"\x80\x04K\x01." + bytes(100), "pickles are never opened"),
}


@pytest.mark.parametrize("name", BYTES)
def test_hostile_bytes(name, file, tmp_path):
    make, message = BYTES[name]
    (tmp_path / "evil.safetensors").write_bytes(make(file.read_bytes()))
    _refused(tmp_path / "evil.safetensors", ConceptFileError, message)


TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "NaN": ({FULL: torch.full((24, 32), float("nan"))}, "768 values are not finite"),
    "huge": ({FULL: torch.full((24, 32), 1e20)}, "over 10000"),
    "integers": ({FULL: torch.zeros(24, 32, dtype=torch.int8)}, "expected fp16, bf16 or fp32"),
    "another shape": ({FULL: torch.zeros(24, 31)}, r"expected \(out, in\) = \(24, 32\), found \(24, 31\)"),
    "a number": ({FULL: torch.zeros(())}, "expected 2 or 4 dimensions"),
    "half of a pair": ({FULL: None, DOWN: torch.zeros(2, 32)}, "stands alone"),
    "ranks that differ": ({FULL: None, DOWN: torch.zeros(2, 32), UP: torch.zeros(24, 3)}, "do not fit together"),
    "full and factors": ({DOWN: torch.zeros(2, 32), UP: torch.zeros(24, 2)}, "expected one of them"),
    "an unknown layer": (
        {"unet.conv_norm_out.diff": torch.zeros(24, 32)},
        "layer 'unet.conv_norm_out' is not in this base",
    ),
    "an unknown tensor": ({"x\n": torch.zeros(2)}, r"'x\\n' is not known"),
    "a word too many": ({"word:<cat1>": torch.zeros(16, 32)}, "not those that are listed"),
    "a word too few": ({"word:<dogx1>": None}, "not those that are listed"),
    "a word of another width": ({"word:<dogx1>": torch.zeros(16, 31)}, "word <dogx1>: expected"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_tensors(name, file, tmp_path):
    changes, message = TENSORS[name]
    _changed(file, tmp_path / "evil.safetensors", changes, {})
    _refused(tmp_path / "evil.safetensors", ConceptFileError, message)


INFO: dict[str, tuple[dict[str, Any], type[MixOfShowError], str]] = {
    "a newer format": ({"format_version": 2}, ConceptFileError, "format_version"),
    "an unknown field": ({"path\n": "x"}, ConceptFileError, r"unknown key 'path\\n'"),
    "no base": ({"base": None}, ConceptFileError, "'base'"),
    "another base": ({"base_fingerprint": "0" * 16}, ConceptFileError, "this base is"),
    "an ordinary word": ({"aliases": {"cat": ["<dogx1>"]}}, TokenError, "cannot be a placeholder"),
    "an alias of nothing": ({"aliases": {"<a>": ["<b>"]}}, ConceptFileError, "unknown words"),
    "words of another type": ({"words": 3}, ConceptFileError, "'words'"),
}


@pytest.mark.parametrize("name", INFO)
def test_hostile_metadata(name, file, tmp_path):
    info, error, message = INFO[name]
    _changed(file, tmp_path / "evil.safetensors", {}, info)
    _refused(tmp_path / "evil.safetensors", error, message)


@pytest.mark.parametrize("text", ["", "x", "[]", "null", "1", "[" * 10_000])
def test_metadata_that_is_no_table(text, tmp_path):
    safetensors.torch.save_file({}, tmp_path / "evil.safetensors", {DELTA_KEY: text})
    _refused(tmp_path / "evil.safetensors", ConceptFileError, "metadata")


@pytest.mark.parametrize("base", ["/etc", "../pipeline", "~/x", "a/../b", "a\\b", "nowhere at all", ""])
def test_it_can_name_no_folder_of_this_machine(base, file, tmp_path):
    _changed(file, tmp_path / "evil.safetensors", {}, {"base": base})
    with pytest.raises(BaseModelError, match="give its folder as the base"):
        load_model(tmp_path / "evil.safetensors")


def test_a_delta_is_no_concept(file):
    with pytest.raises(ConceptFileError, match="a fused model's delta, not a concept"):
        load_concept(file)


def test_a_concept_is_no_model(golden_concepts, tmp_path):
    golden_concepts[0].save(tmp_path / "concept.safetensors")
    _refused(tmp_path / "concept.safetensors", ConceptFileError, "a concept, not a model")


def _changed(file: Path, path: Path, tensors: dict[str, torch.Tensor | None], info: dict[str, Any]) -> None:
    """The file with other tensors (None: without) and metadata, and a digest that is right for them."""
    found = {**safetensors.torch.load_file(file), **tensors}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    with safetensors.safe_open(file, "pt") as opened:
        text = json.dumps(json.loads(opened.metadata()[DELTA_KEY]) | info)
    safetensors.torch.save_file(kept, path, {"format": "pt", DELTA_KEY: text, "sha256": digest(kept, text)})


def _refused(path: Path, error: type[MixOfShowError], message: str) -> None:
    with pytest.raises(MixOfShowError, match=message) as raised:
        load_model(path, base=BASE)
    assert type(raised.value) is error
    assert str(raised.value).isprintable()
