"""Arbitrary text as prompt, placeholder or region: it is read or refused, and changes nothing for anyone else."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.words import Vocabulary, check_word, token_ids
from mixofshow.errors import MixOfShowError, RegionError, TokenError
from mixofshow.sampling.regions import Region, as_shares, cells, levels

quick = settings(max_examples=300, deadline=None, derandomize=True, database=None)

ANY_TEXT = st.text(st.characters(codec=None), max_size=200)  # lone surrogates too
PIECES = st.sampled_from(
    [
        "<dogx1>",
        "<DOGX2>",
        "<dogx>",
        "<manx1><manx2>",
        "<",
        ">",
        "<|endoftext|>",
        "a ",
        " castle",
        "\0",
        "\ud800",
        "🙂",
        "<a>",
        "\n",
    ]
)
PROMPTS = ANY_TEXT | st.lists(PIECES, max_size=12).map("".join)
NUMBERS = st.floats() | st.integers(-10, 2000)


def test_only_our_errors_leave_token_ids(golden_pipeline, golden_concepts):
    known = vocabulary(golden_concepts)

    @quick
    @given(prompt=PROMPTS, length=st.none() | st.just(77))
    def law(prompt, length):
        try:
            ids = token_ids(prompt, golden_pipeline.tokenizer, known, 654, length)
        except TokenError as error:
            assert str(error).isprintable()
            return
        assert ids[0] == 652
        assert 653 in ids
        assert max(ids) < 654 + 4
        assert length is None or len(ids) == length

    law()


def test_splitting_loses_nothing(golden_concepts):
    known = vocabulary(golden_concepts)

    @quick
    @given(prompt=PROMPTS)
    def law(prompt):
        try:
            pieces = known.split(prompt)
        except TokenError as error:
            assert str(error).isprintable()
            return
        written = prompt.lower().replace("<dogx>", "<dogx1><dogx2>").replace("<manx>", "<manx1><manx2>")
        assert "".join("".join(pieces).lower().split()) == "".join(written.split())

    law()


@quick
@given(
    text=ANY_TEXT
    | st.builds(
        lambda *parts: ",".join(map(str, parts[:-1])) + ":" + parts[-1], NUMBERS, NUMBERS, NUMBERS, NUMBERS, ANY_TEXT
    ),
    width=st.integers(8, 4096),
    height=st.integers(8, 4096),
)
def test_only_our_errors_leave_regions(text, width, height):
    try:
        region = Region.parse(text)
        left, top, right, bottom = as_shares(region, width=width, height=height)
    except RegionError as error:
        assert str(error).isprintable()
        return
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1
    first_column, first_row, end_column, end_row = cells((left, top, right, bottom), columns=24, rows=16)
    assert min(first_column, first_row) >= 0
    assert end_column <= 24
    assert end_row <= 16


@quick
@given(box=st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), prompt=ANY_TEXT)
def test_only_our_errors_leave_boxes(box, prompt):
    try:
        share = as_shares(Region(prompt, box), width=192, height=128)
    except RegionError as error:
        assert str(error).isprintable()
        return
    assert all(math.isfinite(edge) for edge in share)


@quick
@given(columns=st.integers(1, 64), rows=st.integers(1, 64), depth=st.integers(1, 8))
def test_every_level_has_fewer_cells_or_one(columns, rows, depth):
    counts = [math.prod(grid) for grid in levels(columns, rows, depth)]
    assert len(counts) == depth
    assert all(fewer < more or more == 1 for more, fewer in itertools.pairwise(counts))


@quick
@given(word=ANY_TEXT)
def test_check_word_gives_the_word_or_refuses_it(word):
    try:
        assert check_word(word) == word
        assert word.isascii()
    except TokenError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("word", ["<a>", "<v1>", "<dog-x_2>", "<0>", "<" + "a" * 32 + ">"])
def test_good_placeholders(word):
    assert check_word(word) == word


@pytest.mark.parametrize(
    "word",
    [
        "",
        " ",
        "cat",
        "a photo of",
        "<>",
        "< a>",
        "<a >",
        "<a b>",
        "<A>",
        "<a",
        "a>",
        "<<a>>",
        "<a><b>",
        "<a>\n",
        "<_a>",
        "<-a>",
        "<a.b>",
        "<|endoftext|>",
        "</w>",
        "cat</w>",
        "<é>",
        "<ａ>",
        "<\u0430>",
        "<a\u200d>",
        "<a\0>",
        "\ud800",
        "<" + "a" * 33 + ">",
        "<" * 10_000,
    ],
)
def test_refused_placeholders(word):
    with pytest.raises(TokenError, match="cannot be a placeholder") as error:
        check_word(word)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <dogx3> here", "unknown concept '<dogx3>' in the prompt; did you mean '<dogx"),
        ("a <zzzzzz>", "known are <dogx>, <manx>, <dogx1>, <dogx2>, <manx1>, <manx2>"),
        ("<|endoftext|>", "unknown concept"),
        ("<\x1b[31m>", r"unknown concept '<\\x1b\[31m>'"),
        ("a \udcff", r"not valid Unicode text: 'a \\udcff'"),
        ("castle " * 100 + "<dogx2>", "77 tokens and <dogx2> would be cut"),
        ("castle " * 100 + "<manx>", "<manx1> would be cut"),
    ],
)
def test_refused_prompts(prompt, message, golden_pipeline, golden_concepts):
    with pytest.raises(TokenError, match=message):
        token_ids(prompt, golden_pipeline.tokenizer, vocabulary(golden_concepts), 654, 77)


def test_a_prompt_that_is_cut_is_reported(golden_pipeline, caplog):
    token_ids("castle " * 100 + "in red", golden_pipeline.tokenizer, Vocabulary(), 654, 77)
    (record,) = [record for record in caplog.records if record.name.startswith("mixofshow")]
    assert "prompt cut to 77 tokens" in record.getMessage()
    assert "in red" in record.getMessage()


def test_without_concepts_every_placeholder_is_refused():
    with pytest.raises(MixOfShowError, match="unknown concept '<a>' in the prompt; no concept is loaded"):
        Vocabulary().split("an <a>")


def test_the_tokenizer_is_never_changed(golden_pipeline, golden_concepts):
    tokenizer = golden_pipeline.tokenizer
    text = "a photo of dogx1 <dogx1 > and a <dogx1> concatenate <|endoftext|>"
    before, size, added = tokenizer(text).input_ids, len(tokenizer), tokenizer.get_added_vocab()
    token_ids("a <dogx> and a <manx>", tokenizer, vocabulary(golden_concepts), 654, 77)
    assert tokenizer(text).input_ids == before
    assert len(tokenizer) == size
    assert tokenizer.get_added_vocab() == added
