"""Captions vary as asked for, and only then."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mixofshow.tuning.captions import TEMPLATES, varied
from mixofshow.tuning.settings import CaptionSettings

CAPTION = "a photo of <cat>, on a mat, in the sun, asleep"


def _many(settings, caption=CAPTION, *, seed=0, count=200):
    generator = torch.Generator().manual_seed(seed)
    return [varied(caption, "<cat>", settings, generator) for _ in range(count)]


@pytest.mark.parametrize("caption", [CAPTION, "", " two  spaces ,, kept,", "{}"])
def test_with_everything_off_nothing_changes_and_nothing_is_drawn(caption):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert varied(caption, "<cat>", CaptionSettings(), generator) == caption
    assert torch.equal(generator.get_state(), before)


@given(st.lists(st.text("abc {}<>", min_size=1), max_size=8), st.integers(0, 9), st.integers(0, 2**32))
@hypothesis_settings(max_examples=100, deadline=None, derandomize=True)
def test_shuffling_keeps_all_parts_and_the_first_in_place(parts, keep, seed):
    plain = [part.strip() for part in parts if part.strip()]
    settings = CaptionSettings(shuffle=True, keep=keep)
    found = varied(",".join(parts), "<cat>", settings, torch.Generator().manual_seed(seed))
    shuffled = found.split(", ") if found else []
    assert Counter(shuffled) == Counter(plain)
    assert shuffled[:keep] == plain[:keep]


def test_shuffling_reaches_every_order():
    assert len(set(_many(CaptionSettings(shuffle=True)))) == 6
    assert len(set(_many(CaptionSettings(shuffle=True, keep=0), count=400))) == 24
    assert set(_many(CaptionSettings(shuffle=True, keep=3))) == {CAPTION}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_without_a_caption_is_as_asked_for(share):
    found = Counter(_many(CaptionSettings(dropout=share), count=2000))
    assert set(found) <= {CAPTION, ""}
    # Four standard deviations of a binomial distribution.
    assert abs(found[""] / 2000 - share) <= 4 * (share * (1 - share) / 2000) ** 0.5


@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_template_of_its_kind_and_no_other_is_used(kind):
    found = set(_many(CaptionSettings(templates=kind)))
    assert found == {template.replace("{}", "<cat>") for template in TEMPLATES[kind]}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_name_the_concept_once(kind):
    assert 8 <= len(set(TEMPLATES[kind])) == len(TEMPLATES[kind]) <= 12
    assert all(template.count("{}") == 1 and template.count("{") == 1 for template in TEMPLATES[kind])


def test_there_are_templates_for_every_choice_of_the_setting():
    choices = get_args(CaptionSettings.model_fields["templates"].annotation)
    assert set(choices) == {"none", *TEMPLATES}


def test_a_placeholder_is_not_taken_for_a_template():
    settings = CaptionSettings(templates="object")
    assert "<{0}>" in varied("", "<{0}>", settings, torch.Generator().manual_seed(0))


def test_the_same_seed_gives_the_same_captions():
    settings = CaptionSettings(templates="scene", dropout=0.3, shuffle=True, keep=0)
    assert _many(settings, seed=1) == _many(settings, seed=1) != _many(settings, seed=2)
