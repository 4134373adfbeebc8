"""Prompt weights in A1111's grammar, on request; other tools' marks are said: issue 19 §2.16 and §2.7, case 21."""

from __future__ import annotations

import itertools
import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mixofshow import Region
from mixofshow.bases.families import of_encoders
from mixofshow.concepts import syntax
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import ConceptModel
from mixofshow.concepts.prompts import emphasized, encode_prompts
from mixofshow.concepts.syntax import foreign_marks, read_prompt, write_prompt
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import SettingsError, TokenError
from mixofshow.sampling.composition import from_options, make_composition
from mixofshow.sampling.conditioning import concept_places, concepts_in, encode, without_concepts
from mixofshow.sampling.drawing import draw_pictures
from mixofshow.sampling.replay import PNG_KEY, replay
from mixofshow.tuning.captions import Naming
from mixofshow.tuning.check import check_folder
from mixofshow.tuning.dataset import read_folder

A1111 = Vocabulary(syntax="a1111")
ASKED = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 0, "output_type": "latent"}
LEFT = (0, 0, 32, 48)


@pytest.fixture
def model(golden_pipeline, golden_concepts):
    known = vocabulary(golden_concepts)
    known = Vocabulary(known.embeddings, known.aliases, "a1111")
    return ConceptModel(golden_pipeline, known, concepts=golden_concepts)


@pytest.fixture(autouse=True)
def _unsaid():
    syntax._say.cache_clear()


# ---- the grammar

PUBLISHED = {
    # What the documentation of A1111's web UI shows, worked out by hand.
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1),
        ("house", 1.3 * 1.1 * 1.1),
        (" ", 1.1),
        ("on", 1),
        (" a ", 1.1),
        ("hill", 0.5 * 1.1),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
    "a [word]": [("a ", 1), ("word", 1 / 1.1)],
    "a ((word))": [("a ", 1), ("word", 1.21)],
    "a (word:1.5)": [("a ", 1), ("word", 1.5)],
    "a (word: .25 )": [("a ", 1), ("word", 0.25)],
    r"a \(word\)": [("a (word)", 1)],
    "a word:1.5)": [("a word:1.5)", 1)],
    "a :) word]": [("a :) word]", 1)],
    "(3:4 ratio:1.2)": [("3:4 ratio", 1.2)],
    "[a (b] c)": [("a ", 1 / 1.1), ("b", 1), (" c", 1.1)],
    r"\\ a\b": [("\\ ab", 1)],
    "": [],
}


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_published_examples(prompt):
    found = read_prompt(prompt, "a1111")
    assert [text for text, _ in found] == [text for text, _ in PUBLISHED[prompt]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in PUBLISHED[prompt]])
    assert read_prompt(prompt, "plain") == [(prompt, 1.0)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(alphabet=r"ab:().[]\1 ", max_size=30))
def test_what_is_written_is_read_as_it_was(prompt):
    try:
        pieces = read_prompt(prompt, "a1111")
    except TokenError as error:
        assert "\n" not in str(error)  # 1.1.1 is no number
        return
    assert read_prompt(write_prompt(pieces, "a1111"), "a1111") == pieces
    assert all(one[1] != other[1] for one, other in itertools.pairwise(pieces))
    assert all(text for text, _ in pieces)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(cat:1.2.3)", "prompt weights: expected a number such as 1.3, found '1.2.3'"),
        ("(cat:101)", "prompt weights: expected at most 100 in all, found 101"),
        ("((cat:50):-3)", "expected at most 100 in all, found 150"),
        ("(cat:" + "9" * 400 + ")", "expected at most 100 in all, found inf"),
        ("(a" * 2000, "more than 100 brackets in one another"),
        ("[a" * 2000, "more than 100 brackets in one another"),
        ("(a <nobody>:1.2)", "unknown concept '<nobody>'"),
    ],
)
def test_refused_weights(prompt, message, draw):
    with pytest.raises(TokenError, match=message.replace("(", r"\(")):
        draw(prompt, prompt_syntax="a1111", **ASKED)


# ---- what the UNet reads


def _states(encoder, ids, layer):
    return encoder(ids, output_hidden_states=True).hidden_states[layer] if layer else encoder(ids).last_hidden_state


def _by_hand(states, weights):
    """A1111's way: (1, tokens, dim)."""
    heavier = states * torch.tensor(weights)[None, :, None]
    return heavier * (states.mean() / heavier.mean())


def _expected(encoder, tokenizer, pieces, layer=None):
    """The states of one encoder, from its tokens one by one: (1, tokens, dim)."""
    ids, weights = [tokenizer.bos_token_id], [1.0]
    for text, weight in pieces:
        own = tokenizer(text, add_special_tokens=False).input_ids
        ids, weights = ids + own, weights + [weight] * len(own)
    ids, weights = [*ids, tokenizer.eos_token_id], [*weights, 1.0]
    ids += [tokenizer.pad_token_id] * (77 - len(ids))
    weights += [1.0] * (77 - len(weights))
    return _by_hand(_states(encoder, torch.tensor([ids]), layer), weights)


PIECES = [("a photo of", 1.0), ("a dog", 1.3), ("on the", 1.0), ("beach", 1 / 1.1), ("and a", 1.0), ("man", 0.0)]
PROMPT = "a photo of (a dog:1.3) on the [beach] and a (man:0)"


@torch.no_grad()
def test_weights_of_one_encoder(golden_pipeline):
    found = encode_prompts(golden_pipeline, [PROMPT, "a dog"], A1111).hidden
    expected = _expected(golden_pipeline.text_encoder, golden_pipeline.tokenizer, PIECES)
    assert torch.allclose(found[0], expected.expand(16, -1, -1), rtol=1e-4, atol=1e-6)
    assert torch.equal(found[1], encode_prompts(golden_pipeline, ["a dog"], Vocabulary()).hidden[0])


@torch.no_grad()
def test_weights_of_two_encoders_keep_the_mean_of_each(xl_pipeline):
    found = encode_prompts(xl_pipeline, [PROMPT], A1111)
    first, second = of_encoders(xl_pipeline, found.hidden)
    for states, encoder, tokenizer in (
        (first, xl_pipeline.text_encoder, xl_pipeline.tokenizer),
        (second, xl_pipeline.text_encoder_2, xl_pipeline.tokenizer_2),
    ):
        expected = _expected(encoder, tokenizer, PIECES, layer=-2)
        assert torch.allclose(states[0], expected.expand(len(states[0]), -1, -1), rtol=1e-4, atol=1e-6)
    plain = encode_prompts(xl_pipeline, ["a photo of a dog on the beach and a man"], Vocabulary())
    assert torch.equal(found.pooled, plain.pooled)


@torch.no_grad()
def test_weights_of_a_concept_in_each_layers_variant(model):
    plain = vocabulary(model.concepts)
    found = encode_prompts(model.pipeline, ["a (<dogx>:1.4) [here]"], model.vocabulary).hidden[0]
    states = encode_prompts(model.pipeline, ["a <dogx> here"], plain).hidden[0]
    ids = model.pipeline.tokenizer("here", add_special_tokens=False).input_ids
    weights = [1.0, 1.0, 1.4, 1.4, *[1 / 1.1] * len(ids)]
    weights += [1.0] * (77 - len(weights))
    assert not torch.equal(states[0], states[1])
    for layer, variant in enumerate(states):
        assert torch.allclose(found[layer], _by_hand(variant[None], weights)[0], rtol=1e-4, atol=1e-6), layer


def test_a_mean_of_zero():
    """It cannot be made what it was; but a norm without bias leaves nothing else, and that is as it was."""
    states = torch.tensor([[[1.0, 1.0], [1.0, -3.0]]])
    assert not emphasized(torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]]), torch.tensor([0.5, 1.0])).isfinite().any()
    assert torch.equal(emphasized(states, torch.tensor([2.0, 1.0])), states * torch.tensor([[2.0], [1.0]]))


def test_a_mean_of_zero_is_an_error(golden_pipeline, monkeypatch):
    monkeypatch.setattr("mixofshow.concepts.prompts.emphasized", lambda states, _: states * torch.inf)
    with pytest.raises(SettingsError, match="prompt weights: the states of 'a .cat.' come to a mean of 0.*change a"):
        encode_prompts(golden_pipeline, ["a (cat)"], A1111)


@torch.no_grad()
def test_what_is_cut_is_cut_with_its_weight(golden_pipeline):
    prompt = "a dog " * 60 + "(man:1.5)"
    found = encode_prompts(golden_pipeline, [prompt], A1111).hidden
    assert torch.equal(found, encode_prompts(golden_pipeline, [prompt.replace("(man:1.5)", "man")], A1111).hidden)


# ---- concepts are found under their marks


@pytest.mark.parametrize(
    ("prompt", "bare", "class_words", "names"),
    [
        ("(a <dogx>:1.3) here", "a <dogx> here", "(a object :1.3) here", ("dogx",)),
        ("((<manx>)) and [<dogx>]", "<manx> and <dogx>", None, ("manx", "dogx")),
        ("<dogx1>(<dogx2>:1.3) here", "<dogx> here", "object here", ("dogx",)),
        (r"a \(<dogx>\)", "a (<dogx>)", r"a \( object \)", ("dogx",)),
    ],
)
def test_concepts_are_found(prompt, bare, class_words, names, model, golden_concepts):
    plain = ConceptModel(model.pipeline, vocabulary(golden_concepts), concepts=golden_concepts)
    assert concepts_in(model, prompt) == names
    assert concept_places(model, prompt) == concept_places(plain, bare) != ()
    found = without_concepts(model, prompt)
    assert class_words is None or found == class_words
    assert Vocabulary(syntax="a1111").split(found) and "<" not in found


@torch.no_grad()
def test_regions_and_negative_prompts(model):
    regions = [Region("(a <dogx>:1.3)", LEFT, strength=0.5, negative_prompt="(red:0.5)")]
    how = {"width": 64, "height": 48, "guided": True}
    found = encode(model, "a [castle]", "(blue)", regions, **how)

    def alone(prompt):
        return encode_prompts(model.pipeline, [prompt], model.vocabulary).hidden

    assert torch.equal(found.text, torch.cat([alone("(blue)"), alone("a [castle]")]))
    plain, own = found.regions
    assert torch.equal(plain.text, torch.cat([alone("(red:0.5)"), alone("(a object:1.3)")]))
    assert torch.equal(own.text, torch.cat([alone("(red:0.5)"), alone("(a <dogx>:1.3)")]))
    assert own.words == (2, 3)
    assert not torch.equal(own.text[1], encode_prompts(model.pipeline, ["a <dogx>"], model.vocabulary).hidden[0])


# ---- pictures


def test_without_weights_nothing_changes(draw):
    asked = {**ASKED, "negative_prompt": "red", "regions": [Region("a <dogx>", LEFT)]}
    plain = draw("a castle", **asked)[0]
    assert torch.equal(draw("a (castle:1.0)", prompt_syntax="a1111", **asked)[0], plain)
    weighted = draw("a (castle:1.4)", prompt_syntax="a1111", **asked)[0]
    assert not torch.allclose(weighted, plain, atol=1e-4)
    asked["regions"] = [Region("a (<dogx>:1.4)", LEFT)]
    assert not torch.allclose(draw("a castle", prompt_syntax="a1111", **asked)[0], plain, atol=1e-4)
    assert draw.model.vocabulary.syntax == "plain"


def test_a_regional_lora_finds_its_concept(draw):
    asked = {**ASKED, "prompt_syntax": "a1111", "regional_lora": True}
    plain = draw("a castle", regions=[Region("a <dogx>", LEFT)], **asked)[0]
    assert torch.equal(draw("a castle", regions=[Region("a (<dogx>:1)", LEFT)], **asked)[0], plain)
    assert not torch.allclose(draw("a castle", regions=[Region("a (<dogx>:2)", LEFT)], **asked)[0], plain, atol=1e-4)


def test_a_composition_says_it_and_is_replayed(draw, tmp_path):
    table = "prompt: a (castle:1.4)\nprompt_syntax: a1111\nwidth: 64\nheight: 48\nsteps: 1\n"
    (tmp_path / "c.yaml").write_text(table)
    wanted = from_options(tmp_path / "c.yaml", {})
    assert from_options(tmp_path / "c.yaml", {"prompt_syntax": "plain"}).prompt_syntax == "plain"
    draw_pictures(draw, wanted, [tmp_path / "0.png"])
    with Image.open(tmp_path / "0.png") as image:
        said = json.loads(image.info[PNG_KEY])["composition"]
    assert said["prompt_syntax"] == "a1111"
    replay(draw, tmp_path / "0.png", tmp_path / "1.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    del said["prompt_syntax"]  # as before there was one
    assert make_composition(said).prompt_syntax == "plain"
    with pytest.raises(SettingsError, match="prompt_syntax.*a1111"):
        make_composition(said | {"prompt_syntax": "compel"})


# ---- marks that are ordinary text

FOREIGN = {
    "a photo of a (cat:1.4)": "(cat:1.4)",
    "a photo of a ((cat))": "((cat))",
    "(masterpiece), a cat": "(masterpiece)",
    r"reimu \(touhou\)": r"\(",
    "a [cat]": "[cat]",
    "a [cat:dog:0.5]": "[cat:dog:0.5]",
    "a [cat|dog]": "[cat|dog]",
    "a cat BREAK in the snow": "BREAK",
    "a cat AND a dog": "AND",
    "a cat ADDCOL a dog": "ADDCOL",
    "a cat ADDROW a dog": "ADDROW",
    "a {cat|dog}": "{cat|dog}",
    "a __animal__": "__animal__",
    "a cat++ here": "cat++",
    "a cat--": "cat--",
    "a (big cat)++": "(big cat)++",
    "a ((big) cat)--": ")--",
    "a (big cat)1.3 here": "(big cat)1.3",
    "a (cat).5": "(cat).5",
    "a cat | a dog": "cat | a",
    '("a cat", "a dog").blend(0.5, 0.5)': ").blend(",
    "a cat, embedding:easynegative": "embedding:easynegative",
    "a cat::2 dog": "::2",
    "a cat --ar 16:9": "--ar",
}
ORDINARY = [
    "a photo of a <clown> on the beach, 50% <3 :) and so on",
    "BEST quality; a well-known rock-n-roll cat - at 3:4",
    "a cat -- and a dog; 'quoted' \"twice\" (or",
    "a dog--cat, 1+1=2, snake_case",
    "breaking and adding",
    "a cat :)3 and a|b",
]


@pytest.mark.parametrize("prompt", FOREIGN)
def test_marks_of_other_tools_are_found(prompt):
    assert FOREIGN[prompt] in foreign_marks(prompt)


@pytest.mark.parametrize("prompt", ORDINARY)
def test_ordinary_text_has_none(prompt):
    assert foreign_marks(prompt) == foreign_marks(prompt, "a1111") == []


def _said(caplog):
    return [one.getMessage() for one in caplog.records if "marks" in one.getMessage()]


def test_marks_are_said_once(draw, caplog):
    asked = {**ASKED, "num_inference_steps": 1, "negative_prompt": "{red|blue}"}
    for _ in range(2):
        draw("a (castle:1.4)", regions=[Region("a <dogx> BREAK", LEFT)], **asked)
    (line,) = _said(caplog)
    assert line == (
        "prompt: '(castle:1.4)', '{red|blue}', 'BREAK': another tool's marks, read as ordinary text here; "
        "`prompt_syntax` a1111 reads weights"
    )
    assert len(line) <= 300
    caplog.clear()
    draw("a (castle)1.4", **{**ASKED, "num_inference_steps": 1})
    assert _said(caplog) == ["prompt: '(castle)1.4': another tool's marks, read as ordinary text here"]
    caplog.clear()
    draw("a (castle:1.4) BREAK", prompt_syntax="a1111", **{**ASKED, "num_inference_steps": 1})
    assert _said(caplog) == ["prompt: 'BREAK': another tool's marks, read as ordinary text here"]


def test_a_web_uis_lora_says_what_to_do(draw):
    with pytest.raises(TokenError, match="'<lora:detail:0.8>' in the prompt loads nothing here; `mixofshow convert`"):
        draw("a castle <lora:detail:0.8>", **ASKED)


@pytest.mark.parametrize("prompt", ["(a <dogx:1.2>)", "<lora:dogx:0.8> a castle", "<dogx:1.2> on a beach"])
@pytest.mark.parametrize("way", ["plain", "a1111"])
def test_a_weight_within_a_concepts_brackets_says_where_it_goes(prompt, way, draw):
    with pytest.raises(
        TokenError, match=r"in the prompt: write <dogx>; with a weight, \(<dogx>:1\.2\), where `prompt_syntax`"
    ):
        draw(prompt, prompt_syntax=way, **ASKED)


HALF = {
    "<dogx on the beach": "<dogx on the beach",
    "a < dogx> there": "< dogx> there",
    "a <dogx1 > there": "<dogx1 > there",
    "a dogx> on the beach": "dogx> on the beach",
    "a <dog x> there": "<dog x> there",
    "(a <DOGX:1.2)": "<DOGX:1.2)",
    "<dogx> and <manx": "<manx",
    "<dogg": "<dogg",
}


@pytest.mark.parametrize("prompt", HALF)
def test_a_concept_that_lacks_a_bracket_is_said(prompt, model):
    """It was ordinary text, and the concept was missing from the picture."""
    named = re.escape(HALF[prompt])
    with pytest.raises(TokenError, match=f"'{named}': expected a concept's name .* did you mean '<(dog|man)x1?>'"):
        replace(model.vocabulary, syntax="plain").split(prompt)


@pytest.mark.parametrize("prompt", ["we <3 cats", "a<b and c>d", "->", "x < 3 > 1", "<", "a dogx, a man", "5 <= 6"])
def test_other_brackets_are_ordinary_text(prompt, model):
    assert "".join(replace(model.vocabulary, syntax="plain").split(prompt)) == prompt


def test_a_caption_whose_concept_lacks_a_bracket_is_named(tmp_path):
    """Its class word was taken for the concept, and what was left of the name for text."""
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a <mydog a dog in the snow")
    naming = Naming("<mydog>", ["<mydog1>", "<mydog2>"], "dog")
    (found,) = (one for one in check_folder(tmp_path, naming=naming) if one.level == "error")
    assert "'<mydog a dog in the snow': expected a concept's name" in found.message
    (tmp_path / "0.txt").write_text("a dog, 50% <3")
    assert not any(one.level == "error" for one in check_folder(tmp_path, naming=naming))


def test_marks_in_captions_are_said_once(tmp_path, caplog):
    for number, caption in enumerate(("(a <mydog>:1.3) BREAK in the snow", "a <mydog>", "((a <mydog>))")):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    what = "2 have another tool's marks, read as ordinary text here: 'BREAK', '(a <mydog>:1.3)' in 0.txt"
    with caplog.at_level(logging.WARNING):
        read_folder(tmp_path, instance_prompt="a <mydog>")
    assert f"captions: {what}" in caplog.text
    assert [str(one) for one in check_folder(tmp_path)][-1] == f"captions: {what}"
