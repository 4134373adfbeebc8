"""Laws of regions: geometry, and what a region may and may not change."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from mixofshow.bases.layers import cross_attentions
from mixofshow.errors import RegionError
from mixofshow.sampling.attention import RegionText, regional, shares
from mixofshow.sampling.conditioning import encode
from mixofshow.sampling.regions import Region, Shape, as_shares, cells, levels

COLUMNS, ROWS = 24, 16
EVERYWHERE = (0.0, 0.0, 1.0, 1.0)
LEFT, MIDDLE, LOW = (0.0, 0.0, 0.5, 1.0), (0.25, 0.1, 0.8, 0.9), (0.1, 0.6, 1.0, 1.0)


@pytest.fixture
def predict(golden_pipeline):
    """Noise for some regions, under one global text."""
    unet = golden_pipeline.unet
    latents = torch.randn(2, 4, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def noise(*regions: RegionText, **how) -> torch.Tensor:
        with regional(unet, text(0), regions, batch=2, columns=COLUMNS, rows=ROWS, **how):
            return unet(latents, 500, text(0)).sample

    return noise


def region_text(box, text, **how):
    return RegionText(Shape(box=box), text, **how)


def text(seed: int) -> torch.Tensor:
    return torch.randn(2, 16, 77, 32, generator=torch.Generator().manual_seed(seed))


def test_a_whole_region_with_the_global_prompt_changes_nothing(predict, relative_error):
    assert relative_error(predict(region_text(EVERYWHERE, text(0))), predict()) < 1e-6


def test_the_global_prompt_in_any_region_changes_nothing(predict, relative_error):
    assert relative_error(predict(region_text(MIDDLE, text(0)), region_text(LOW, text(0))), predict()) < 1e-6


def test_a_region_changes_the_picture(predict, relative_error):
    assert relative_error(predict(region_text(LEFT, text(1))), predict()) > 1e-3


def test_a_region_too_small_for_any_cell_changes_nothing_if_it_is_dropped(predict):
    assert torch.equal(predict(region_text((0.01, 0.01, 0.02, 0.02), text(1)), tiny="drop"), predict())


def test_two_equal_regions_are_one(predict):
    region = region_text(MIDDLE, text(1))
    assert torch.equal(predict(region, region), predict(region))


def test_the_order_of_regions_does_not_matter(predict, relative_error):
    regions = [region_text(box, text(seed)) for seed, box in enumerate((LEFT, MIDDLE, LOW), start=1)]
    assert relative_error(predict(*regions[::-1]), predict(*regions)) < 1e-5


THIRD, REST = (0.0, 0.0, 1 / 3, 1.0), (1 / 3, 0.0, 1.0, 1.0)
"""They meet between two cells of every feature map."""


@pytest.mark.parametrize("isolate", [0, 1])
def test_a_region_in_front_has_the_cells_that_it_shares_with_one_behind(predict, isolate):
    front, behind = region_text(THIRD, text(1), front=1), region_text(EVERYWHERE, text(2))
    cut = predict(region_text(THIRD, text(1)), region_text(REST, text(2)), isolate=isolate)
    torch.testing.assert_close(predict(front, behind, isolate=isolate), cut)
    torch.testing.assert_close(predict(behind, front, isolate=isolate), cut)
    farther = region_text(THIRD, text(1), front=-1)
    assert torch.equal(predict(farther, behind), predict(behind))  # what is wholly hidden is not there


def test_a_soft_edge_in_front_lets_through_as_much_as_it_leaves():
    soft, half = torch.tensor([[1.0, 0.75, 0.25, 0.0]]), torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    texts = [region_text(EVERYWHERE, text(1), front=3, weight=9), region_text(EVERYWHERE, text(2), front=2)]
    for together in (False, True):
        found = shares(torch.stack([torch.zeros(1, 4), soft, half]), texts, together=together)
        torch.testing.assert_close(found[1], soft)
        torch.testing.assert_close(found[2], (1 - soft) * half)
        torch.testing.assert_close(found.sum(0), torch.ones(1, 4))


@pytest.mark.parametrize("box", [LEFT, MIDDLE, LOW])
@torch.no_grad()
def test_cross_attention_changes_in_the_box_only(box, golden_pipeline):
    attention = next(iter(cross_attentions(golden_pipeline.unet).values()))
    hidden = torch.randn(2, ROWS * COLUMNS, 16, generator=torch.Generator().manual_seed(2))
    without = attention(hidden, encoder_hidden_states=text(0)[:, 0])
    unet, regions = golden_pipeline.unet, [region_text(box, text(1))]
    with regional(unet, text(0), regions, batch=2, columns=COLUMNS, rows=ROWS):
        changed = (attention(hidden, encoder_hidden_states=text(0)[:, 0]) != without).all(-1)[0].view(ROWS, COLUMNS)
    left, top, right, bottom = cells(box, columns=COLUMNS, rows=ROWS)
    expected = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    expected[top:bottom, left:right] = True
    assert torch.equal(changed, expected)


def test_pixels_and_shares_are_the_same(golden_fused):
    size = {"width": 192, "height": 128}
    pixels, shares = Region("", (48, 32, 144, 128)), Region("", (0.25, 0.25, 0.75, 1.0))
    assert as_shares(pixels, **size) == as_shares(shares, **size) == (0.25, 0.25, 0.75, 1.0)


@torch.no_grad()
def test_a_region_without_negative_prompt_has_the_global_one(golden_fused):
    size = {"width": 192, "height": 128, "guided": True}
    silent, same, empty = (Region("a castle", EVERYWHERE, negative) for negative in (None, "lowres", ""))
    found = encode(golden_fused, "a beach", "lowres", [silent, same, empty], **size).regions
    assert torch.equal(found[0].text, found[1].text)
    assert not torch.equal(found[0].text, found[2].text)


@pytest.mark.parametrize(
    ("written", "region"),
    [
        ("0,0,1,1: a cat", Region("a cat", (0, 0, 1, 1))),
        (" 8, 10 ,120.5,100 :a <cat>: red, big ", Region("a <cat>: red, big ", (8, 10, 120.5, 100))),
        ("0,0,1,1:", Region("", (0, 0, 1, 1))),
        ("0,0,1,1: two\nlines", Region("two\nlines", (0, 0, 1, 1))),
    ],
)
def test_regions_are_read(written, region):
    assert Region.parse(written) == region


@pytest.mark.parametrize(
    "written",
    [
        "",
        "a cat",
        "0,0,1: a cat",
        "0,0,1,1,1: a cat",
        "a,b,c,d: a cat",
        "0 0 1 1: a cat",
        "__import__('os'): x",
        ": a cat",
        "0,0,1,1 a cat",
    ],
)
def test_other_texts_are_no_regions(written):
    with pytest.raises(RegionError, match="expected"):
        Region.parse(written)


@pytest.mark.parametrize("strength", [10.5, -11, 1e30, float("nan")])
def test_a_lora_is_no_stronger_than_concepts_may_be(strength):
    with pytest.raises(RegionError, match="'adapters.alice': input should be"):
        Region("a girl", (0, 0, 64, 64), adapters={"alice": strength})


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((-8, 0, 64, 64), "outside"),
        ((0, 0, 200, 64), "outside"),
        ((0, 0, 64, 129), "outside"),
        ((0, -0.1, 0.5, 0.5), "outside"),
        ((64, 0, 32, 64), "left < right"),
        ((0, 0.5, 1, 0.5), "left < right"),
        ((0, 0, float("nan"), 1), "finite"),
        ((0, 0, float("inf"), 1), "finite"),
        ((1, 1, 7, 7), "too small"),
        ((0.01, 0, 0.02, 1), "too small"),
    ],
)
def test_boxes_that_are_refused(box, reason, golden_fused):
    with pytest.raises(RegionError, match=reason) as error:
        encode(golden_fused, "", "", [Region("a castle", box)], width=192, height=128, guided=True)
    assert str(tuple(box)) in str(error.value)


@pytest.mark.parametrize(("columns", "rows"), [(16, 16), (24, 16), (17, 9), (1, 5), (64, 96)])
def test_every_level_of_the_unet_is_found(columns, rows, golden_pipeline):
    down = golden_pipeline.unet.down_blocks[0].downsamplers[0].conv
    level = torch.zeros(1, 1, rows, columns)
    for grid in levels(columns, rows, 4):
        assert grid == (level.shape[3], level.shape[2])
        level = conv2d(level, torch.ones(1, 1, 3, 3), stride=down.stride, padding=down.padding)
