"""Files of other tools mean what those tools make of them: in both directions, by their own loaders where there are any."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixofshow.bases.layers import TEXT_PREFIX, layer, matrix
from mixofshow.concepts.adapters import tuned_weights
from mixofshow.concepts.changes import Full, LowRank
from mixofshow.concepts.concept import Concept, load_concept, vocabulary
from mixofshow.concepts.interchange.convert import convert, half_precision_error
from mixofshow.concepts.interchange.exporting import low_rank_changes, mean_vectors
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ConvertSettings, ImportSettings
from mixofshow.concepts.model import with_concept
from mixofshow.concepts.prompts import encode_prompts
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import MixOfShowError, SettingsError, TokenError

CONCEPTS = Path(__file__).parents[1] / "goldens" / "concepts"
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
TO_K, TO_OUT, PROJ = f"unet.{BLOCK}.attn2.to_k", f"unet.{BLOCK}.attn1.to_out.0", "unet.mid_block.attentions.0.proj_in"
TEXT = f"text_encoder.{TEXT_PREFIX}encoder.layers.0.self_attn.q_proj"

Deltas = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def reference(golden_pipeline) -> Concept:
    """The reference implementation's own file of the first golden concept."""
    return open_concept(CONCEPTS / "edlora_dogx.pth", golden_pipeline)


@pytest.fixture
def pairs(golden_pipeline) -> Pairs:
    """Random halves (down, up) of a change of four layers, rank 4."""
    sizes = {name: matrix(layer(golden_pipeline, name)).shape for name in (TO_K, TO_OUT, PROJ, TEXT)}
    return {name: (torch.randn(4, inner), torch.randn(outer, 4) / 100) for name, (outer, inner) in sizes.items()}


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal to 1e-6 of the largest."""
    return found.shape == expected.shape and float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def loaded_changes(pipeline: Any) -> Deltas:
    """The changes that diffusers made of the one adapter it has loaded, by our layer names."""
    found = {}
    for part in ("unet", "text_encoder"):
        for path, module in getattr(pipeline, part).named_modules():
            for adapter in getattr(module, "lora_A", {}):
                prefix = TEXT_PREFIX if part == "text_encoder" and not path.startswith(TEXT_PREFIX) else ""
                found[f"{part}.{prefix}{path}"] = module.get_delta_weight(adapter).detach().flatten(1)
    return found


def same_changes(found: Deltas, concept: Concept) -> None:
    assert found.keys() == concept.deltas.keys()
    assert [name for name, one in concept.deltas.items() if not close(found[name], one.matrix())] == []


# ---- the reference implementation


def test_its_files_are_the_golden_concepts(reference, golden_concepts):
    assert reference.info.words == golden_concepts[0].info.words
    assert (reference.info.name, reference.info.method, reference.info.rank) == ("dogx", "ed-lora", 4)
    assert torch.equal(reference.embeddings, golden_concepts[0].embeddings)
    same_changes({name: one.matrix() for name, one in golden_concepts[0].deltas.items()}, reference)


def test_golden_embeddings_and_weights(reference, golden, golden_pipeline, relative_error):
    text = golden("a_text")
    half = open_concept(CONCEPTS / "edlora_dogx.pth", golden_pipeline, ImportSettings(text_encoder_alpha=0.7))
    for strength, concept in ((0.7, half), (1.0, reference)):
        with with_concept(golden_pipeline, concept).active():
            found = encode_prompts(golden_pipeline, [text.values["prompts"][1]], vocabulary([concept])).hidden
        assert relative_error(found, text[f"embeds_alpha{strength}_prompt1"]) < 1e-5
    name = f"{TEXT_PREFIX}encoder.layers.1.self_attn.out_proj"
    found = tuned_weights(golden_pipeline, half, [f"text_encoder.{name}"])[f"text_encoder.{name}"]
    assert relative_error(found, text[f"merged0.7.{name}.weight"]) < 1e-5


def test_words_keep_their_order(golden_pipeline, tmp_path):
    vectors = {word: torch.randn(16, 32) / 50 for word in ("<z>", "<a>", "<m>")}
    torch.save({"params": {"new_concept_embedding": vectors}}, tmp_path / "edlora.pth")
    concept = open_concept(tmp_path / "edlora.pth", golden_pipeline, ImportSettings(words="<z> <A> <m>"))
    assert concept.info.words == tuple(vectors)
    assert torch.equal(concept.embeddings, torch.stack(list(vectors.values())))


def test_its_older_generation(reference, golden_pipeline, tmp_path):
    params = torch.load(CONCEPTS / "edlora_dogx.pth", weights_only=True)["params"]
    for part in ("unet", "text_encoder"):
        params[part] = {key.replace(".lora_", "_lora."): tensor for key, tensor in params[part].items()}
    torch.save({"params": params}, tmp_path / "edlora.pth")
    assert open_concept(tmp_path / "edlora.pth", golden_pipeline).hash == reference.hash


# ---- LoRA of other tools


def underscored(name: str) -> str:
    return name.replace(".", "_")


def kohya(prefix: str = "lora_te_text_model_", alpha: float | None = 2.0) -> Callable[[str, Tensor, Tensor], Any]:
    def write(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        key = underscored(name).replace("text_encoder_text_model_", prefix)
        key = f"lora_{key}" if key.startswith("unet_") else key
        more = {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
        return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up} | more

    return write


def dotted(
    down_suffix: str, up_suffix: str, rename: Callable[[str], str] = str
) -> Callable[[str, Tensor, Tensor], Any]:
    return lambda name, down, up: {rename(name) + down_suffix: down, rename(name) + up_suffix: up}


def processors(name: str) -> str:
    """Names as diffusers wrote them before peft."""
    return name.replace("attn2.to_k", "attn2.processor.to_k").replace("attn1.to_out.0", "attn1.processor.to_out")


A_B, D_U, OLD = (".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"), "_lora.{}.weight"
WRITERS: dict[str, tuple[Callable[[str, Tensor, Tensor], Any], float]] = {
    "kohya": (kohya(), 0.5),
    "kohya without alpha": (kohya(alpha=None), 1),
    "kohya without text_model": (kohya("lora_te_"), 0.5),
    "kohya, SDXL's name of the encoder": (kohya("lora_te1_text_model_"), 0.5),
    "diffusers": (dotted(*A_B), 1),
    "diffusers without text_model": (dotted(*A_B, lambda name: name.replace(TEXT_PREFIX, "")), 1),
    "diffusers, older": (dotted(*D_U), 1),
    "diffusers, oldest": (dotted(OLD.format("down"), OLD.format("up"), processors), 1),
    "linear layers": (dotted(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"), 1),
    "peft": (dotted(*A_B, lambda name: f"base_model.model.{name.split('.', 1)[1]}"), 1),
    "peft in training": (dotted(".lora_A.default.weight", ".lora_B.default.weight"), 1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_names_of_other_tools(name, pairs, golden_pipeline, tmp_path):
    write, scale = WRITERS[name]
    tensors: dict[str, Tensor] = {}
    for key, (down, up) in pairs.items():
        tensors |= write(key, down, up)
    save_file(tensors, tmp_path / "lora.safetensors")
    concept = open_concept(tmp_path / "lora.safetensors", golden_pipeline, ImportSettings(words="man"))
    same_changes({key: scale * up @ down for key, (down, up) in pairs.items()}, concept)
    assert concept.info.method == "lora"


def test_what_peft_trained_and_diffusers_saved(golden_pipeline, tmp_path):
    pipeline = copy.deepcopy(golden_pipeline)
    for part, targets, other in (("unet", ["to_k", "to_out.0"], "attn1.to_q"), ("text_encoder", ["q_proj"], "mlp.fc1")):
        patterns = {"rank_pattern": {other: 2}, "alpha_pattern": {other: 5}}
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=[*targets, other], init_lora_weights=False, **patterns
        )
        getattr(pipeline, part).add_adapter(config)
    saved = {
        part: convert_state_dict_to_diffusers(
            peft.get_peft_model_state_dict(getattr(pipeline, part), adapter_name="default")
        )
        for part in ("unet", "text_encoder")
    }
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=saved["unet"],
        text_encoder_lora_layers=saved["text_encoder"],
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipeline.text_encoder.peft_config["default"].to_dict(),
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    concept = open_concept(file, golden_pipeline, ImportSettings(words="man"))
    same_changes(loaded_changes(pipeline), concept)
    assert {one.down.shape[0] for one in concept.deltas.values()} == {2, 4}


def test_layers_that_no_concept_can_change_are_left_out_with_a_notice(pairs, xl_pipeline, tmp_path, caplog):
    other = "lora_te2_text_projection"
    tensors = {f"{other}.lora_down.weight": torch.ones(4, 24), f"{other}.lora_up.weight": torch.ones(12, 4)}
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    save_file(tensors | kohya()(name, torch.ones(4, 16), torch.ones(16, 4)), tmp_path / "lora.safetensors")
    with caplog.at_level(logging.WARNING):
        concept = open_concept(tmp_path / "lora.safetensors", xl_pipeline, ImportSettings(words="man"))
    assert list(concept.deltas) == [name]
    assert "1 layers left out" in caplog.text
    assert "projection" in caplog.text


def test_a_rank_above_the_layers_own_is_kept_in_full(golden_pipeline, tmp_path):
    down, up = torch.randn(64, 32), torch.randn(24, 64) / 100
    save_file(kohya(alpha=64)(TO_K, down, up), tmp_path / "lora.safetensors")
    concept = open_concept(tmp_path / "lora.safetensors", golden_pipeline, ImportSettings(words="man"))
    assert isinstance(concept.deltas[TO_K], Full)
    same_changes({TO_K: up @ down}, concept)


def test_small_halves_do_not_fade_in_half_precision(golden_pipeline, tmp_path):
    down, up = torch.randn(4, 32), torch.randn(24, 4) * 1e-6
    save_file(kohya(alpha=None)(TO_K, down, up), tmp_path / "lora.safetensors")
    concept = open_concept(tmp_path / "lora.safetensors", golden_pipeline, ImportSettings(words="man"))
    assert half_precision_error(concept) < 1e-3
    concept.save(tmp_path / "concept.safetensors")
    kept = load_concept(tmp_path / "concept.safetensors").deltas[TO_K].matrix()
    assert float((kept - up @ down).norm() / (up @ down).norm()) == pytest.approx(
        half_precision_error(concept), rel=1e-3
    )


@pytest.mark.parametrize(
    ("given", "metadata"),
    [
        ("man near the beach", {}),
        (None, {"modelspec.trigger_phrase": "man near the beach"}),
        (None, {"ss_tag_frequency": json.dumps({"10_man near the beach": {"x": 1}})}),
        ("man near the beach", {"modelspec.trigger_phrase": "photo"}),
    ],
)
def test_placeholders_read_like_the_trigger_words(given, metadata, pairs, golden_pipeline, tmp_path):
    save_file(kohya()(TEXT, *pairs[TEXT]), tmp_path / "My Style.safetensors", metadata)
    concept = open_concept(tmp_path / "My Style.safetensors", golden_pipeline, ImportSettings(words=given))
    count = len(golden_pipeline.tokenizer("man near the beach", add_special_tokens=False).input_ids)
    assert concept.info.words == tuple(f"<my-style{number}>" for number in range(1, count + 1))
    found = encode_prompts(golden_pipeline, ["photo of <my-style>"], vocabulary([concept])).hidden
    assert torch.equal(found, encode_prompts(golden_pipeline, ["photo of man near the beach"], Vocabulary()).hidden)


# ---- embeddings


def a1111_pickle(vectors: Tensor, path: Path) -> None:
    table = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "x",
        "step": 3,
        "sd_checkpoint": None,
    }
    torch.save(table, path)


EMBEDDINGS: dict[str, tuple[str, Callable[[Tensor, Path], None], ImportSettings, tuple[str, ...]]] = {
    "A1111 pickle": ("hat.pt", a1111_pickle, ImportSettings(), ("<hat1>", "<hat2>")),
    "A1111": (
        "hat.safetensors",
        lambda two, path: save_file({"emb_params": two}, path),
        ImportSettings(words="<a> <b>"),
        ("<a>", "<b>"),
    ),
    "diffusers, two words": (
        "x.safetensors",
        lambda two, path: save_file({"<A>": two[0].clone(), "<b>": two[1].clone()}, path),
        ImportSettings(),
        ("<a>", "<b>"),
    ),
    "diffusers, a word of two vectors": (
        "x.safetensors",
        lambda two, path: save_file({"<hat>": two}, path),
        ImportSettings(),
        ("<hat1>", "<hat2>"),
    ),
    "renamed": (
        "x.safetensors",
        lambda two, path: save_file({"Some Style": two}, path),
        ImportSettings(name="cap"),
        ("<cap1>", "<cap2>"),
    ),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_of_other_tools(name, golden_pipeline, tmp_path):
    file, write, settings, words = EMBEDDINGS[name]
    vectors = torch.randn(2, 32) / 50
    write(vectors, tmp_path / file)
    concept = open_concept(tmp_path / file, golden_pipeline, settings)
    assert concept.info.words == words
    assert torch.equal(concept.embeddings, vectors[:, None])
    assert (concept.info.method, concept.deltas) == ("textual-inversion", {})


# ---- export


@pytest.fixture
def shared(golden_concepts, tmp_path) -> Concept:
    """A golden concept as others get it: from its file."""
    golden_concepts[0].save(tmp_path / "shared.safetensors")
    return load_concept(tmp_path / "shared.safetensors")


def run(source: Path, target: Path, pipeline: Any, **settings: Any) -> str:
    return "\n".join(convert(source, target, pipeline, ConvertSettings(**settings)))


@pytest.mark.parametrize(
    ("to", "lora", "token"), [("diffusers", "pytorch_lora_weights", None), ("kohya", "dogx", "<dogx>")]
)
def test_diffusers_loads_what_is_exported(to, lora, token, shared, golden_pipeline, tmp_path):
    said = run(tmp_path / "shared.safetensors", tmp_path / "out", golden_pipeline, to=to)
    assert "140 layers, exact" in said
    pipeline = copy.deepcopy(golden_pipeline)
    pipeline.load_lora_weights(tmp_path / "out", weight_name=f"{lora}.safetensors")
    same_changes(loaded_changes(pipeline), shared)

    mean, lost = mean_vectors(shared)
    plain = Vocabulary({word: one[None] for word, one in zip(shared.info.words, mean, strict=True)})
    prompt = "photo of {} near the beach"
    with with_concept(golden_pipeline, shared).active():
        expected = encode_prompts(golden_pipeline, [prompt.format(shared.prompt)], plain).hidden[:, 0]
    pipeline.load_textual_inversion(tmp_path / "out", weight_name="dogx-words.safetensors", token=token)
    with torch.no_grad():
        found, _ = pipeline.encode_prompt(prompt.format("<dogx>"), "cpu", 1, False)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert all(f"{word} {one:.2g}" in said for word, one in lost.items())


def test_the_text_encoder_keeps_its_prefix(shared, golden_pipeline, tmp_path):
    run(tmp_path / "shared.safetensors", tmp_path / "a", golden_pipeline, to="diffusers")
    run(tmp_path / "shared.safetensors", tmp_path / "b", golden_pipeline, to="kohya")
    keys = list(load_file(tmp_path / "a" / "pytorch_lora_weights.safetensors"))
    assert {key.startswith("text_encoder.text_model.encoder.") for key in keys if key.startswith("text")} == {True}
    keys = list(load_file(tmp_path / "b" / "dogx.safetensors"))
    assert {key.startswith("lora_te_text_model_encoder_") for key in keys if key.startswith("lora_te")} == {True}


def test_metadata_and_card(shared, golden_pipeline, tmp_path):
    info = shared.info.model_copy(update={"author": "Ann\n# x", "license": "cc0-1.0"})
    dataclasses.replace(shared, info=info).save(tmp_path / "shared.safetensors")
    run(tmp_path / "shared.safetensors", tmp_path / "out", golden_pipeline, to="kohya")
    with safe_open(tmp_path / "out" / "dogx.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "dogx-words"
    data = (tmp_path / "out" / "dogx.safetensors").read_bytes()
    numbers = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(numbers).hexdigest()}"
    card = (tmp_path / "out" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "cc0-1.0"
    assert "Ann\\n# x" in body


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_there_and_back(to, shared, golden_pipeline, tmp_path):
    run(tmp_path / "shared.safetensors", tmp_path / "out", golden_pipeline, to=to)
    (lora,) = (path for path in (tmp_path / "out").glob("*.safetensors") if "words" not in path.name)
    words = tmp_path / "out" / "dogx-words.safetensors"
    back = open_concept(lora, golden_pipeline, ImportSettings(embeddings=words, name="dogx"))
    same_changes({name: one.matrix() for name, one in back.deltas.items()}, shared)
    assert (back.info.words, back.info.layers) == (shared.info.words, 1)
    assert close(back.embeddings[:, 0], mean_vectors(shared)[0])


def test_a_concept_is_converted_to_itself_or_renamed(shared, golden_pipeline, tmp_path):
    run(tmp_path / "shared.safetensors", tmp_path / "same.safetensors", golden_pipeline)
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "shared.safetensors").read_bytes()
    run(tmp_path / "shared.safetensors", tmp_path / "cat.safetensors", golden_pipeline, name="cat", unet_alpha=0.5)
    renamed = load_concept(tmp_path / "cat.safetensors", golden_pipeline)
    assert (renamed.info.name, renamed.info.words) == ("cat", ("<cat1>", "<cat2>"))
    assert close(renamed.deltas[TO_K].matrix(), shared.deltas[TO_K].matrix() / 2)
    assert close(renamed.deltas[TEXT].matrix(), shared.deltas[TEXT].matrix())


def test_full_changes_are_exported_if_they_have_a_low_rank(golden_pipeline):
    low, noise = torch.randn(24, 3) @ torch.randn(3, 32), torch.randn(24, 32)
    factors, lost = low_rank_changes({TO_K: Full(low)}, None)
    assert factors[TO_K].down.shape == (3, 32)
    assert float((factors[TO_K].matrix() - low).norm() / low.norm()) < 1e-6
    assert lost.overall < 1e-6
    with pytest.raises(SettingsError, match=r"rank: the change of 'unet\.mid_block.*' is of rank 24"):
        low_rank_changes({TO_K: Full(noise)}, None)
    cut, lost = low_rank_changes({TO_K: Full(noise), TO_OUT: LowRank(torch.ones(2, 24), torch.ones(24, 2))}, 4)
    tail = torch.linalg.svdvals(noise)[4:].norm() / noise.norm()
    assert (cut[TO_K].down.shape, cut[TO_OUT].down.shape) == ((4, 32), (2, 24))
    assert lost.overall == pytest.approx(float(tail), rel=1e-5)


# ---- what is refused


K = kohya()(TO_K, torch.ones(4, 32), torch.ones(24, 4))
KEY = next(iter(K)).removesuffix(".lora_down.weight")
MAN = ImportSettings(words="man")
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, str], ImportSettings, str]] = {
    "nothing": ({}, {"a": "b"}, MAN, "neither a LoRA nor an embedding"),
    "no trigger words": (K, {}, ImportSettings(), "names no trigger words"),
    "two folders of training": (K, {"ss_tag_frequency": '{"1_a": 1, "2_b": 1}'}, ImportSettings(), "no trigger words"),
    "a special token": (K, {}, ImportSettings(words="<|endoftext|>"), "does not know the words '<|endoftext|>'"),
    "too many trigger words": (K, {}, ImportSettings(words="a " * 76), "are 76 tokens, at most 75"),
    "a layer of another base": ({k.replace("mid", "mad"): v for k, v in K.items()}, {}, MAN, "is not in this base"),
    "another width": (kohya()(TO_K, torch.ones(4, 33), torch.ones(24, 4)), {}, MAN, r"found \(24, 33\)"),
    "another rank": (kohya()(TO_K, torch.ones(3, 32), torch.ones(24, 4)), {}, MAN, "do not fit together"),
    "rank 0": (kohya()(TO_K, torch.ones(0, 32), torch.ones(24, 0)), {}, MAN, "do not fit together"),
    "one half": ({k: v for k, v in K.items() if "up" not in k}, {}, MAN, "expected a lower and an upper half"),
    "twice": (K | dotted(*A_B)(TO_K, torch.ones(4, 32), torch.ones(24, 4)), {}, MAN, "is there twice"),
    "NaN": (K | {f"{KEY}.lora_up.weight": torch.full((24, 4), float("nan"))}, {}, MAN, "not finite"),
    "integers": (K | {f"{KEY}.lora_up.weight": torch.ones(24, 4).int()}, {}, MAN, "expected fp16, bf16 or fp32"),
    "alpha NaN": (K | {f"{KEY}.alpha": torch.tensor(float("nan"))}, {}, MAN, "alpha to be one finite number"),
    "alpha of two": (K | {f"{KEY}.alpha": torch.ones(2)}, {}, MAN, "alpha to be one finite number"),
    "alpha huge": (K | {f"{KEY}.alpha": torch.tensor(1e30)}, {}, MAN, "finite number of at most"),
    "LoHa": ({f"{KEY}.hada_w1_a": torch.ones(4, 4)}, {}, MAN, "expected a tensor 'hada_w1_b'"),
    "two kinds in one layer": (K | {f"{KEY}.hada_w1_a": torch.ones(4, 4)}, {}, MAN, "several kinds of adapter at once"),
    "DoRA": (K | {f"{KEY}.dora_scale": torch.ones(4, 4)}, {}, MAN, "expected 32 magnitudes, found 16"),
    "OFT": ({f"{KEY}.oft_blocks": torch.ones(4, 4)}, {}, MAN, "an OFT, which is not read"),
    "a whole base": (
        {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4)},
        {},
        MAN,
        "a whole base model",
    ),
    "configuration of text": (K, {"lora_adapter_metadata": "{"}, MAN, "not valid JSON"),
    "configuration without numbers": (
        dotted(*A_B)(TO_K, torch.ones(4, 32), torch.ones(24, 4)),
        {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'},
        MAN,
        "expected lora_alpha to be a finite number of at most 1e\\+06, found x",
    ),
    "an embedding of another width": ({"emb_params": torch.zeros(1, 33)}, {}, ImportSettings(), "of width 32"),
    "76 vectors": ({"emb_params": torch.zeros(76, 32)}, {}, ImportSettings(), "at most 75"),
    "a base model": ({f"w{k}": torch.zeros(2, 2) for k in range(80)}, {}, ImportSettings(), "no embedding of a word"),
    "vectors of two widths": (
        {"<a>": torch.zeros(32), "<b>": torch.zeros(31)},
        {},
        ImportSettings(),
        "embeddings of different shapes",
    ),
    "an ordinary word": ({"cat": torch.zeros(32)}, {}, ImportSettings(), "'cat' cannot be a placeholder"),
    "one word twice": ({"<a>": torch.zeros(32), "<A>": torch.zeros(32)}, {}, ImportSettings(), "not all different"),
    "words too few": ({"emb_params": torch.zeros(2, 32)}, {}, ImportSettings(words="<a>"), "2 vectors, but 1 words"),
    "other words": ({"<a>": torch.zeros(32)}, {}, ImportSettings(words="<b>"), "its words are <a>, not <b>"),
    "17 layers": (
        {"new_concept_embedding/<a>": torch.zeros(17, 32)},
        {},
        ImportSettings(),
        "embeddings of 17 layers, this base has 16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported(name, golden_pipeline, tmp_path):
    tensors, metadata, settings, message = REFUSED[name]
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(MixOfShowError, match=message) as error:
        open_concept(tmp_path / "x.safetensors", golden_pipeline, settings)
    assert str(error.value).startswith(f"{tmp_path / 'x.safetensors'}: ")
    assert str(error.value).isprintable()


def test_a_name_that_is_none(golden_pipeline, tmp_path):
    save_file({"emb_params": torch.zeros(1, 32)}, tmp_path / "###.safetensors")
    with pytest.raises(TokenError, match="no name can be made"):
        open_concept(tmp_path / "###.safetensors", golden_pipeline)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"to": "onnx"}, "'to'"),
        ({"tp": "kohya"}, "unknown key 'tp'; did you mean 'to'"),
        ({"name": "A b"}, "'name'"),
        ({"rank": 0}, "'rank'"),
        ({"unet_alpha": "nan"}, "'unet_alpha'"),
    ],
)
def test_settings_that_cannot_be(table, message):
    with pytest.raises(SettingsError, match=message):
        ConvertSettings.of(table)
