"""Laws of concept files: what is written is what is read, and a damaged file is never read."""

from __future__ import annotations

import dataclasses
import os
import random
import stat

import pytest
import torch

from mixofshow.concepts.concept import Concept, load_concept, vocabulary
from mixofshow.errors import BadInputError, ConceptFileError, TokenError


@pytest.fixture
def saved(golden_concepts, tmp_path):
    """A good concept file, small enough to read a thousand times."""
    whole = golden_concepts[0]
    concept = dataclasses.replace(whole, deltas=dict(list(whole.deltas.items())[:3]))
    path = tmp_path / "dogx.safetensors"
    concept.save(path)
    return path


def same(one: Concept, other: Concept) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return (
        one.info == other.info and mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    )


def test_save_then_load_gives_the_concept(golden_pipeline, golden_concepts, tmp_path):
    for concept in golden_concepts:
        concept.save(tmp_path / "concept.safetensors")
        found = load_concept(tmp_path / "concept.safetensors", golden_pipeline)
        assert same(found, concept)
        assert found.hash == concept.hash
        assert [type(value) for value in found.info.settings.values()] == [int, float, bool, type(None), str]


def test_load_then_save_gives_the_file(saved, tmp_path):
    load_concept(saved).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_the_hash_is_of_content_alone(golden_concepts):
    one, other = golden_concepts
    renamed = dataclasses.replace(one, info=one.info.model_copy(update={"author": "someone", "class_word": "cat"}))
    reworded = dataclasses.replace(one, info=one.info.model_copy(update={"words": ("<a>", "<b>")}))
    assert renamed.hash == one.hash
    assert len({one.hash, other.hash, reworded.hash}) == 3


def test_a_flipped_bit_is_refused(saved):
    good, chance = saved.read_bytes(), random.Random(0)
    for _ in range(200):
        position = chance.randrange(len(good))
        saved.write_bytes(good[:position] + bytes([good[position] ^ 1 << chance.randrange(8)]) + good[position + 1 :])
        with pytest.raises((ConceptFileError, TokenError), match="dogx.safetensors"):
            load_concept(saved)


def test_a_flipped_bit_in_the_metadata_is_refused(saved):
    good, chance = saved.read_bytes(), random.Random(1)
    start, end = good.index(b"__metadata__"), good.index(b"data_offsets")
    for position in range(start, end):
        saved.write_bytes(good[:position] + bytes([good[position] ^ 1 << chance.randrange(8)]) + good[position + 1 :])
        with pytest.raises((ConceptFileError, TokenError), match="dogx.safetensors"):
            load_concept(saved)


def test_a_cut_file_is_refused(saved):
    good, chance = saved.read_bytes(), random.Random(2)
    for length in chance.sample(range(len(good)), 50):
        saved.write_bytes(good[:length])
        with pytest.raises(ConceptFileError, match=r"dogx.safetensors: .*(empty|too short|cut)"):
            load_concept(saved)


@pytest.mark.parametrize("surplus", [b"\0", b" ", b"}"])
def test_a_surplus_byte_is_refused(surplus, saved):
    saved.write_bytes(saved.read_bytes() + surplus)
    with pytest.raises(ConceptFileError, match="1 surplus bytes"):
        load_concept(saved)


def test_headers_of_any_length_are_read(saved):
    """Also those whose first byte is that of a pickle."""
    concept, first_bytes = load_concept(saved), set()
    for length in range(0, 256, 4):
        longer = dataclasses.replace(concept, info=concept.info.model_copy(update={"license": "x" * length}))
        longer.save(saved)
        first_bytes.add(saved.read_bytes()[0])
        assert same(load_concept(saved), longer)
    assert 0x80 in first_bytes


def test_a_save_that_fails_keeps_the_old_file(saved, golden_concepts, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Exception, match="No space left"):
        golden_concepts[1].save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_saved_file_has_the_usual_permissions(saved):
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~mask


def test_saving_replaces_nothing_but_files(golden_concepts, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe"):
        with pytest.raises(BadInputError, match="not a regular file"):
            golden_concepts[0].save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]


def test_two_concepts_may_not_claim_one_word(golden_concepts):
    one, other = golden_concepts
    for info in (
        {"words": ("<dogx1>", "<manx2>")},
        {"words": ("<dogx>", "<manx2>")},
        {"name": "dogx"},
        {"name": "dogx2"},
    ):
        thief = dataclasses.replace(other, info=other.info.model_copy(update=info))
        with pytest.raises(TokenError, match="two concepts claim"):
            vocabulary([one, thief])
    assert list(vocabulary([one, other]).embeddings) == ["<dogx1>", "<dogx2>", "<manx1>", "<manx2>"]
