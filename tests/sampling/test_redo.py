"""One place of a picture drawn over: what lies outside is the file's own pixels, and there is no seam."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mixofshow import MixOfShowPipeline, redo
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.errors import BadInputError, RegionError, SettingsError, TokenError
from mixofshow.sampling.composition import compose, make_composition
from mixofshow.sampling.drawing import draw_pictures
from mixofshow.sampling.inset import RAMP, faded, pixels_covered, window_of
from mixofshow.sampling.redo import from_redo_options, redo_composition
from mixofshow.sampling.replay import composition_of, replay
from mixofshow.sampling.settings import Region

SIZE = (96, 64)
BOX = (40, 8, 88, 56)
TABLE = {
    "prompt": "a castle",
    "width": SIZE[0],
    "height": SIZE[1],
    "steps": 4,
    "seed": 3,
    "regions": [
        {"prompt": "a <dogx>", "box": [0, 0, 36, 64], "negative_prompt": "red"},
        {"prompt": "a <manx>", "box": list(BOX), "last_step": 1, "strength": 0.5},
    ],
}
ASKED = {"image_strength": 0.75}
SMALL = SimpleNamespace(vae_scale_factor=8, unet=SimpleNamespace(config=SimpleNamespace(sample_size=8)))
"""A base whose pictures have 64 pixels a side."""


@pytest.fixture(scope="module")
def draw(golden_pipeline, golden_concepts):
    model = ConceptModel(golden_pipeline, vocabulary(golden_concepts), concepts=golden_concepts)
    return MixOfShowPipeline.of(model)


@pytest.fixture(scope="module")
def picture(draw, tmp_path_factory):
    """A file that carries what it was made from."""
    path = tmp_path_factory.mktemp("pictures") / "two.png"
    draw_pictures(draw, make_composition(TABLE), [path])
    return path


@pytest.fixture
def mask(tmp_path):
    path = tmp_path / "mask.png"
    white = Image.new("L", SIZE)
    white.paste(255, BOX)
    white.save(path)
    return path


def pixels(source) -> np.ndarray:
    if isinstance(source, Path):
        with Image.open(source) as image:
            return np.array(image.convert("RGB"))
    return np.array(source)


def inside(box=BOX) -> np.ndarray:
    found = np.zeros(SIZE[::-1], bool)
    found[box[1] : box[3], box[0] : box[2]] = True
    return found


@pytest.mark.parametrize(
    ("place", "where"),
    [
        (2, inside()),
        (Region("a <dogx>", (0, 0, 20, 64)), inside((0, 0, 20, 64))),
        (Region("a <dogx>", (0.3, 0.3, 0.5, 0.6)), inside((29, 20, 48, 38))),  # whole pixels
        (Region("a <dogx>", (0, 0, 1, 1)), inside((0, 0, *SIZE))),
    ],
    ids=["number", "edge", "shares", "whole"],
)
def test_outside_of_the_place_every_bit_stays(place, where, draw, picture):
    (found,) = redo(draw, picture, place, **ASKED)
    before, after = pixels(picture), pixels(found)
    assert np.array_equal(after[~where], before[~where])
    assert (after[where] != before[where]).any(-1).mean() > 0.5
    deep = faded(pixels_covered(Region("a", mask=Image.fromarray(where)), found)) == 1
    assert (after[deep] != before[deep]).any()


def test_a_soft_place_changes_nothing_beyond_its_ramp(draw, picture):
    soft = Region("a <dogx>", (40, 16, 72, 48), feather=8)
    (found,) = redo(draw, picture, soft, **ASKED)
    where = inside((36, 12, 76, 52))
    assert np.array_equal(pixels(found)[~where], pixels(picture)[~where])
    assert not np.array_equal(pixels(found), pixels(picture))


def test_a_place_is_the_same_by_number_box_and_mask(draw, picture, mask):
    wanted = [
        from_redo_options(picture, None, ASKED | options)
        for options in (
            {"regions": ["2"]},
            {"regions": ["40,8,88,56"]},
            {"mask": mask},
            {"regions": ["2: a <manx>"]},
        )
    ]
    assert {one.redo.prompt for one in wanted} == {"a <manx>"}
    assert {one.redo.strength for one in wanted} == {0.5}
    found = [redo(draw, picture, one.redo, **ASKED)[0].tobytes() for one in wanted]
    assert len(set(found)) == 1
    assert found[0] == redo(draw, picture, 2, **ASKED)[0].tobytes()
    assert found[0] == redo(draw, Image.open(picture), 2, **ASKED)[0].tobytes()


def test_the_prompt_is_that_of_what_lies_there(picture):
    def prompt_of(place, **settings):
        return redo_composition(picture, place, settings).redo.prompt

    assert prompt_of(Region("", (2, 2, 30, 30))) == "a <dogx>"
    assert prompt_of(Region("", (34, 0, 42, 8))) == "a castle"
    assert prompt_of(Region("", (30, 0, 88, 60))) == "a <manx>"
    assert prompt_of(Region("", (2, 2, 30, 30)), prompt="a <manx>") == "a <manx>"
    assert prompt_of(1, prompt="a <manx>") == "a <manx>"
    assert prompt_of(Region("a house", (2, 2, 30, 30))) == "a house"
    first = redo_composition(picture, Region("", (2, 2, 30, 30)), {"prompt": "a <manx>"})
    assert (first.prompt, first.redo.negative_prompt) == ("a castle", "red")
    own = redo_composition(picture, Region("a bird", (2, 2, 30, 30)), {"negative_prompt": "blue"})
    assert own.redo.negative_prompt == "blue"
    for place in ("1", True):
        with pytest.raises(RegionError, match="place: expected a region's number or a Region"):
            redo_composition(picture, place, {})


def seam(before: np.ndarray, after: np.ndarray, box=BOX) -> float:
    """How much larger steps across the box's edge became than they were, over the mean step inside: 0 is no seam."""
    left, top, right, bottom = box

    def steps(image):
        image = image.astype(float)
        across = [image[top:bottom, edge] - image[top:bottom, edge - 1] for edge in (left, right)]
        down = [image[edge, left:right] - image[edge - 1, left:right] for edge in (top, bottom)]
        return np.abs(np.concatenate([*across, *down])).mean()

    within = np.abs(np.diff(after[top:bottom, left:right].astype(float), axis=1)).mean()
    return (steps(after) - steps(before)) / within


def test_there_is_no_seam(draw, picture):
    """Steps across the edge are what they were, where a plain paste of the same pixels has an edge."""
    before = np.full((64, 96, 3), 128, np.uint8)
    (found,) = redo(draw, Image.fromarray(before), Region("a <manx>", BOX), steps=4, seed=1, image_strength=1.0)
    pasted = np.where(inside()[..., None], pixels(draw("a <manx>", width=96, height=64, seed=1, steps=4)[0]), before)
    assert seam(before, pixels(found)) < 0.5
    assert seam(before, pasted) > 2


def test_the_new_picture_fades_in_inside_of_the_edge():
    blank = Image.new("RGB", (80, 80))
    share = faded(pixels_covered(Region("a", (16, 0, 64, 64)), blank))
    ramp = RAMP * 48
    row = share[20]
    assert row[:16].max() == 0 and row[64:].max() == 0
    assert 0 < row[16] <= 1 / ramp and (row[16 : 16 + int(ramp)].diff() > 0).all()
    assert (row[16 + int(ramp) : 64 - int(ramp)] == 1).all()
    assert share[0, 40] == 1  # the picture's own edge is no seam
    grey = faded(pixels_covered(Region("a", mask=Image.new("L", (80, 80), 51)), blank))
    assert torch.allclose(grey, torch.full((80, 80), 0.2))


@pytest.mark.parametrize(
    ("box", "margin", "window", "size"),
    [
        ((40, 8, 88, 56), 0.25, (24, 0, 96, 64), (72, 64)),  # larger than the base's pictures: nothing is reduced
        ((40, 8, 56, 24), 0.25, (36, 4, 60, 28), (64, 64)),
        ((0, 0, 8, 8), 0, (0, 0, 8, 8), (64, 64)),
        ((0, 0, 96, 64), 1, (0, 0, 96, 64), (96, 64)),
    ],
)
def test_the_window(box, margin, window, size):
    cover = pixels_covered(Region("a", box), Image.new("RGB", SIZE))
    found = window_of(cover, SMALL, margin)
    assert (found.box, found.size) == (window, size)


def test_a_window_keeps_its_shape_as_far_as_it_can():
    for wide, high in ((17, 9), (30, 50), (64, 13), (9, 60)):
        cover = pixels_covered(Region("a", (20, 2, 20 + wide, 2 + high)), Image.new("RGB", (96, 64)))
        found = window_of(cover, SMALL, 0.25)
        left, top, right, bottom = found.box
        assert left <= 20 and top <= 2 and right >= 20 + wide and bottom >= 2 + high
        assert (found.size[0] / (right - left)) / (found.size[1] / (bottom - top)) == pytest.approx(1, abs=0.12)


def test_it_is_drawn_by_the_concepts_own_weights(golden_pipeline, golden_concepts, picture):
    """As regional LoRA, and as one concept on the base, which is all there is of it in the window."""
    together = MixOfShowPipeline.of(
        ConceptModel(golden_pipeline, vocabulary(golden_concepts), concepts=golden_concepts)
    )
    alone = MixOfShowPipeline.of(with_concept(golden_pipeline, golden_concepts[1]))
    place = Region("a <manx>", BOX)
    (regional,) = redo(together, picture, place, **ASKED, regional_lora=True)
    (plain,) = redo(together, picture, place, **ASKED)
    (single,) = redo(alone, picture, place, **ASKED)
    assert np.abs(pixels(regional).astype(int) - pixels(single).astype(int)).max() <= 1
    assert np.abs(pixels(regional).astype(int) - pixels(plain).astype(int)).max() > 1


def test_the_strength_is_how_far_it_goes(draw, picture):
    moved = []
    for strength in (0.25, 0.5, 1.0):
        (found,) = redo(draw, picture, 2, image_strength=strength)
        moved.append(np.abs(pixels(found).astype(float) - pixels(picture)).mean())
    assert moved == sorted(moved) and moved[0] < moved[-1]
    for strength in (0, 0.1):  # as diffusers has it
        with pytest.raises(SettingsError, match="strength"):
            redo(draw, picture, 2, image_strength=strength)


@pytest.mark.parametrize("kind", ["number", "mask"])
def test_it_is_replayed_to_the_same_bytes_and_may_be_redone_again(kind, draw, picture, mask, tmp_path):
    place = {"regions": ["1"]} if kind == "number" else {"mask": mask}
    wanted = from_redo_options(picture, None, {**ASKED, **place, "num": 2, "seed": "8"})
    targets = [tmp_path / "0.png", tmp_path / "1.png"]
    draw_pictures(draw, wanted, targets, layout=tmp_path / "layout.png")
    assert targets[0].read_bytes() != targets[1].read_bytes()
    replay(draw, targets[1], tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == targets[1].read_bytes()
    assert composition_of(targets[1]).seed == 9
    again = from_redo_options(targets[1], None, {**ASKED, "regions": ["2"]})
    assert [one.prompt for one in again.regions] == ["a <dogx>", "a <manx>"]
    (found,) = redo(draw, targets[1], 2, **ASKED)
    where = inside()
    assert np.array_equal(pixels(found)[~where], pixels(targets[1])[~where])


def test_regions_lie_where_they_did_in_an_enlarged_picture(draw, tmp_path):
    table = TABLE | {"regions": [{"prompt": "a <manx>", "box": [32, 0, 64, 32], "feather": 4}], "upscale": 1.5}
    draw_pictures(draw, make_composition(table), [tmp_path / "large.png"])
    found = redo_composition(tmp_path / "large.png", 1)
    assert (found.redo.box, found.redo.feather, found.upscale) == ((48, 0, 96, 48), 6, 1)
    assert (found.width, found.height) == (144, 96)


def test_any_picture_can_be_redone(draw, tmp_path):
    """Of any size and without a note."""
    Image.effect_noise((61, 45), 60).convert("RGB").save(tmp_path / "photo.jpg")
    wanted = from_redo_options(tmp_path / "photo.jpg", None, {"regions": ["3,4,30,40: a <dogx>"], "steps": "2"})
    draw_pictures(draw, wanted, [tmp_path / "0.png"])
    replay(draw, tmp_path / "0.png", tmp_path / "1.png")
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "0.png").read_bytes()
    assert pixels(tmp_path / "0.png").shape == (45, 61, 3)
    assert np.array_equal(pixels(tmp_path / "0.png")[:, 30:], pixels(tmp_path / "photo.jpg")[:, 30:])


def test_only_the_words_of_the_place_need_be_known(golden_pipeline, golden_concepts, picture):
    alone = MixOfShowPipeline.of(with_concept(golden_pipeline, golden_concepts[0]))
    assert redo(alone, picture, 1, **ASKED)
    with pytest.raises(TokenError, match="manx"):
        redo(alone, picture, 2, **ASKED)


def test_controls_are_not_followed_and_that_is_said(picture, caplog):
    before = composition_of(picture)
    known = {"network_hash": "0" * 64, "picture_hash": "0" * 64}
    entry = {"network": "emojiland-t2i-adapter", "picture": "gone.png", **known}
    with caplog.at_level(logging.WARNING):
        found = redo_composition(picture, 1, before=make_composition(before.model_dump() | {"controls": [entry]}))
    assert "controls are not followed" in caplog.text and found.controls == ()


def test_what_only_a_whole_picture_has_is_left_out(picture):
    whole = {"auto": True, "first_pass": 0.3, "isolate": 2, "upscale_strength": 0.3}
    found = redo_composition(picture, 1, before=composition_of(picture).model_copy(update=whole))
    assert not found.auto and found.changed.isdisjoint(whole)


def test_a_margin_of_no_place_is_said(draw, caplog):
    compose(draw, make_composition(TABLE | {"redo_margin": 0.5, "steps": 1, "regions": []}))
    assert "`redo_margin` changes nothing without `redo`" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, SettingsError, "redo: expected one place by `region` NUMBER, .* found 0"),
        ({"regions": ["1", "2"]}, SettingsError, "redo: expected one place .* found 2"),
        ({"regions": ["3"]}, RegionError, "region 3: expected a number from 1 to 2"),
        ({"regions": ["0"]}, RegionError, "region 0: expected a number from 1 to 2"),
        ({"regions": ["0,0,2000,64"]}, RegionError, "lies outside the picture of 96 x 64 pixels"),
        ({"regions": ["1.2,1.2,1.4,1.4"]}, RegionError, "covers no pixel of the picture of 96 x 64"),
        ({"regions": ["1"], "size": "64x64"}, SettingsError, "`size`: expected none with redo: the picture keeps its own"),
        ({"regions": ["1"], "image": "a.png"}, SettingsError, "`image`: expected none with redo"),
        ({"regions": ["1"], "upscale": "2"}, SettingsError, "`upscale`: expected none with redo"),
        ({"regions": ["1"], "isolate": "2"}, SettingsError, "`isolate`: expected none with redo"),
        ({"regions": ["1"], "redo_margin": "-1"}, SettingsError, "'redo_margin'"),
        ({"mask": "none.png"}, BadInputError, "none.png: cannot be read"),
    ],
)
def test_places_that_mean_nothing_are_refused_in_one_line(options, error, message, picture):
    with pytest.raises(error, match=message) as raised:
        from_redo_options(picture, None, options)
    assert "\n" not in str(raised.value)


def test_a_picture_without_a_note_needs_a_prompt(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    with pytest.raises(RegionError, match=r"region \(0, 0, 32, 32\) of '': expected a prompt"):
        from_redo_options(tmp_path / "plain.png", None, {"regions": ["0,0,32,32"]})
    with pytest.raises(RegionError, match="region 2: expected a box or a mask, the picture knows no regions"):
        from_redo_options(tmp_path / "plain.png", None, {"regions": ["2"], "prompt": "a cat"})
    place = Region("", (0, 0, 32, 32))
    assert redo_composition(tmp_path / "plain.png", place, {"prompt": "a cat"}).redo == replace(place, prompt="a cat")
