"""Pictures at their size: shapes, places and masks obey the rules whatever the picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mixofshow.errors import SettingsError
from mixofshow.tuning.dataset import Example
from mixofshow.tuning.settings import PictureSettings
from mixofshow.tuning.transforms import buckets, fit, nearest_bucket, variants

FITS = ("crop", "pad", "bucket")
few = hypothesis_settings(max_examples=60, deadline=None, derandomize=True)


def _example(size=(48, 32), *, smooth=False, masked=True):
    """A picture whose red channel is its mask: noise, or (smooth) what any resizing keeps apart from the edges."""
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    if smooth:
        noise[..., 0] = np.linspace(0, 255, width)[None].round()
    image = Image.fromarray(noise)
    return Example(image, "a cat", "1.png", image.getchannel("R") if masked else None)


def _fit(example, kind="crop", *, seed=None, size=32, multiple=8, flip=False):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return fit(example, PictureSettings(fit=kind), size=size, multiple=multiple, generator=generator, flip=flip)


def _same(first, second):
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("picture", "mask", "valid")]
    return all(one is two is None or torch.equal(one, two) for one, two in pairs)


def _levels(picture):
    return (picture + 1) * 127.5


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("size", [(48, 32), (32, 58), (32, 32)])
def test_a_cut_that_needs_no_resizing_is_a_piece_of_the_picture_and_of_its_mask(size, seed):
    example = _example(size)
    cut = _fit(example, seed=seed)
    array = np.array(example.image)
    places = [(left, top) for top in range(size[1] - 31) for left in range(size[0] - 31)]
    found = _levels(cut.picture).round().to(torch.uint8).permute(1, 2, 0).numpy()
    where = [(left, top) for left, top in places if np.array_equal(found, array[top : top + 32, left : left + 32])]
    assert len(where) == 1
    assert seed is not None or where == [((size[0] - 32) / 2, (size[1] - 32) / 2)]
    torch.testing.assert_close(cut.mask * 255, _levels(cut.picture[:1]), atol=1e-3, rtol=0)
    assert cut.valid is None


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("size", [(90, 61), (61, 90), (20, 17)])
def test_the_mask_goes_where_its_picture_goes(kind, seed, size):
    fitted = _fit(_example(size, smooth=True), kind, seed=seed)
    inside = fitted.valid if fitted.valid is not None else torch.ones_like(fitted.mask)
    difference = (fitted.mask * 255 - _levels(fitted.picture[:1]) * inside).abs()
    # The ramp's slope is up to 255 / 17 a pixel; a shift by one pixel of the result would show everywhere.
    assert difference.mean() < 1.0
    assert fitted.mask.min() >= 0 and fitted.mask.max() <= 1
    assert fitted.picture.min() >= -1 and fitted.picture.max() <= 1


@pytest.mark.parametrize("size", [(48, 32), (31, 77), (32, 32), (10, 13)])
def test_the_middle_is_where_pillow_finds_it(size):
    example = _example(size)
    expected = np.asarray(ImageOps.fit(example.image, (32, 32), Image.Resampling.LANCZOS))
    found = _levels(_fit(example).picture).round().permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1


def test_random_cuts_reach_every_place_and_no_other():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None], (32, 40, 3))
    example = Example(Image.fromarray(np.ascontiguousarray(ramp)), "a cat", "1.png")
    lefts = {int(_levels(_fit(example, seed=seed).picture)[0, 0, 0].round()) for seed in range(80)}
    assert lefts == set(range(9))


@pytest.mark.parametrize("kind", FITS)
def test_the_same_seed_gives_the_same_and_another_another_place(kind):
    example = _example((60, 47))
    assert _same(_fit(example, kind, seed=1), _fit(example, kind, seed=1))
    assert _same(_fit(example, kind, seed=1), _fit(example, kind, seed=2)) == (kind != "crop")


def test_a_random_cut_draws_as_much_from_every_picture():
    states = []
    for size in ((32, 32), (90, 32), (50, 77)):
        generator = torch.Generator().manual_seed(0)
        fit(_example(size), PictureSettings(), size=32, multiple=8, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("kind", FITS)
def test_mirroring_twice_changes_nothing_and_once_is_what_pillow_does(kind):
    example = _example((61, 40))
    plain, mirrored = _fit(example, kind), _fit(example, kind, flip=True)
    for name in ("picture", "mask", "valid"):
        one, two = getattr(plain, name), getattr(mirrored, name)
        assert one is two is None or torch.equal(one.flip(-1), two)
    assert not torch.equal(plain.picture, mirrored.picture)
    turned = Example(ImageOps.mirror(example.image), "", "", ImageOps.mirror(example.mask))
    again = _fit(turned, kind, flip=True)
    if kind != "pad":  # an odd margin stands on one side
        assert (again.picture - plain.picture).abs().max() < 0.02


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (61, 40), (60_000, 1), (32, 32), (8, 5)])
def test_padding_is_grey_and_marked_and_the_rest_is_the_whole_picture(size):
    example = _example(size)
    padded = _fit(example, "pad")
    assert padded.picture.shape == (3, 32, 32) and padded.mask.shape == padded.valid.shape == (1, 32, 32)
    assert set(padded.valid.unique().tolist()) <= {0.0, 1.0}
    rows, columns = padded.valid[0].any(1), padded.valid[0].any(0)
    scale = 32 / max(size)
    assert (int(columns.sum()), int(rows.sum())) == tuple(max(1, round(side * scale)) for side in size)
    margins = [int(line.nonzero()[0]) - (31 - int(line.nonzero()[-1])) for line in (rows, columns)]
    assert all(margin in (-1, 0) for margin in margins)
    assert (padded.picture * (1 - padded.valid)).abs().max() == 0 and (padded.mask * (1 - padded.valid)).max() == 0
    inside = padded.picture[:, rows][:, :, columns]
    expected = example.image.resize((inside.shape[2], inside.shape[1]), Image.Resampling.LANCZOS)
    assert np.array_equal(_levels(inside).round().permute(1, 2, 0).numpy(), np.asarray(expected))


@few
@given(st.integers(1, 64), st.integers(1, 24))
def test_buckets_obey_their_rules(multiple, times):
    size = multiple * times + multiple // 2
    found = buckets(size, multiple)
    assert found == sorted(set(found))
    assert {(height, width) for width, height in found} == set(found)
    for width, height in found:
        assert width % multiple == height % multiple == 0 and width > 0 and height > 0
        assert width * height <= size * size
        assert 0.5 <= width / height <= 2
    sides = range(multiple, 4 * size, multiple)
    highest = {
        (width, max((height for height in sides if width * height <= size * size), default=0)) for width in sides
    }
    good = {pair for pair in highest if pair[1] and 0.5 <= pair[0] / pair[1] <= 2}
    assert set(found) == good | {(height, width) for width, height in good} | {(times * multiple,) * 2}


def test_buckets_of_stable_diffusion():
    assert buckets(512, 64) == [
        (384, 640),
        (448, 576),
        (512, 512),
        (576, 448),
        (640, 384),
    ]


@pytest.mark.parametrize("choices", [[(24, 48), (32, 64)], [(32, 64), (24, 48)]])
def test_of_two_buckets_of_one_shape_the_larger_is_taken(choices):
    assert nearest_bucket((7, 13), choices) == (32, 64)


def test_a_size_below_one_step_has_no_buckets():
    with pytest.raises(SettingsError, match="'pictures.size': 32 is too small for buckets in steps of 64 pixels"):
        buckets(32, 64)


@few
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_bucket_is_the_nearest_in_shape(width, height):
    choices = buckets(96, 8)
    chosen = nearest_bucket((width, height), choices)

    def distance(pair):
        return abs(math.log(pair[0] * height / (pair[1] * width)))

    assert chosen in choices
    assert all(distance(chosen) <= distance(other) + 1e-8 for other in choices)


@few
@given(st.integers(1, 120), st.integers(1, 120), st.sampled_from(FITS), st.booleans(), st.integers(0, 3) | st.none())
def test_every_picture_comes_out_at_its_size(width, height, kind, masked, seed):
    fitted = _fit(_example((width, height), masked=masked), kind, seed=seed)
    expected = nearest_bucket((width, height), buckets(32, 8)) if kind == "bucket" else (32, 32)
    assert fitted.picture.shape == (3, expected[1], expected[0]) and fitted.picture.dtype == torch.float32
    assert (fitted.mask is not None) == masked and (fitted.valid is not None) == (kind == "pad")
    assert not masked or fitted.mask.shape == (1, expected[1], expected[0])
    assert fitted.picture.isfinite().all() and fitted.picture.abs().max() <= 1


def test_a_thread_of_a_picture_costs_no_more_than_its_result():
    assert _fit(_example((60_000, 1)), size=512).picture.shape == (3, 512, 512)


def test_a_bucket_is_filled_from_the_middle():
    image = Image.new("RGB", (160, 32), "black")
    image.paste("white", (48, 0, 112, 32))  # the middle 2:1
    fitted = _fit(Example(image, "", ""), "bucket", size=46, multiple=32, seed=3)
    assert fitted.picture.shape == (3, 32, 64)
    assert fitted.picture.min() == 1


@pytest.mark.parametrize(
    ("kind", "crops", "flip", "count"),
    [
        ("crop", 0, False, 1),
        ("crop", 1, False, 1),
        ("crop", 1, True, 2),
        ("crop", 4, False, 4),
        ("crop", 4, True, 8),
        ("pad", 4, True, 2),
        ("bucket", 0, False, 1),
        ("bucket", 4, True, 2),
    ],
)
def test_variants_are_as_many_as_asked_for(kind, crops, flip, count):
    settings = PictureSettings(fit=kind, crops=crops, flip=flip)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    made = variants(_example((70, 40)), settings, size=32, multiple=8, generator=generator)
    assert len(made) == count
    assert torch.equal(before, generator.get_state()) == (kind != "crop" or crops <= 1)
    if crops <= 1 or kind != "crop":
        assert _same(made[0], _fit(_example((70, 40)), kind))
    else:
        assert len({one.picture.numpy().tobytes() for one in made}) == count
    if flip:
        for plain, mirrored in zip(made[::2], made[1::2], strict=True):
            assert torch.equal(plain.picture.flip(-1), mirrored.picture)
            assert torch.equal(plain.mask.flip(-1), mirrored.mask)
