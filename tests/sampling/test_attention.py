"""Regional attention is the paper's formula, whatever the regions' shapes, weights and steps."""

from __future__ import annotations

import argparse

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from mixofshow.errors import BaseModelError
from mixofshow.sampling.attention import RegionText, regional
from mixofshow.sampling.regions import Shape, coverage

COLUMNS, ROWS, DIM, TOKENS = 12, 9, 16, 7
BLOB = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).clamp(min=0.2)
SHAPES = {
    "box": Shape(box=(0, 0, 0.5, 1)),
    "overlapping": Shape(box=(0.25, 0.2, 0.9, 0.8)),
    "polygon": Shape(polygon=torch.tensor([[0.1, 0.1], [0.9, 0.4], [0.3, 0.95]], dtype=torch.float64)),
    "soft": Shape(mask=BLOB),
    "feathered": Shape(box=(0.5, 0, 1, 0.6), feather=(0.3, 0.3)),
}
CASES = [["box"], ["polygon"], ["soft"], ["box", "overlapping"], list(SHAPES)]


class Layer(nn.Module):
    """As much of a UNet as one block's attention needs."""

    def __init__(self, **options):
        super().__init__()
        self.mid_block = nn.Module()
        self.mid_block.attn1 = Attention(32, heads=4, dim_head=8, **options)
        self.mid_block.attn2 = Attention(32, DIM, heads=4, dim_head=8, **options)
        self.config = argparse.Namespace(block_out_channels=(32,))
        self.dtype = torch.float32

    def forward(self, hidden, text):
        return self.mid_block.attn2(self.mid_block.attn1(hidden), encoder_hidden_states=text)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts_of(names, **how):
    return [RegionText(SHAPES[name], drawn(2, 1, TOKENS, DIM, seed=k + 5), **how) for k, name in enumerate(names)]


def naive(layer, cell, text):
    """softmax(Q Kᵀ/√d) V of one cell, head by head."""
    query, key, value = layer.to_q(cell), layer.to_k(text), layer.to_v(text)
    heads = []
    for h in range(layer.heads):
        part = slice(8 * h, 8 * h + 8)
        scores = [float(query[part] @ one[part]) / 8**0.5 for one in key]
        heads.append(torch.tensor(scores).softmax(0) @ value[:, part])
    return torch.cat(heads)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Layer().requires_grad_(False)


def through(model, regions, hidden, text, **how):
    with regional(model, text, regions, batch=len(hidden), columns=COLUMNS, rows=ROWS, **how) as handle:
        return model.mid_block.attn2(hidden, encoder_hidden_states=text), handle


@pytest.mark.parametrize("names", CASES, ids="+".join)
def test_it_is_the_formula(names, layer):
    hidden, text = drawn(2, ROWS * COLUMNS, 32), drawn(2, 1, TOKENS, DIM, seed=1)
    weights = [1.0, 2.0, 0.5, 3.0, 1.5][: len(names)]
    regions = [RegionText(one.shape, one.text, weight) for one, weight in zip(texts_of(names), weights, strict=True)]
    found, _ = through(layer, regions, hidden, text)
    attention = layer.mid_block.attn2
    covers = [coverage(one.shape, columns=COLUMNS, rows=ROWS).flatten() for one in regions]
    for row in range(2):
        for cell in range(0, ROWS * COLUMNS, 5):
            state = hidden[row, cell]
            c = [float(cover[cell]) for cover in covers]
            total = sum(w * one for w, one in zip(weights, c, strict=True))
            mixed = (1 - max(c)) * naive(attention, state, text[row, 0])
            for w, one, region in zip(weights, c, regions, strict=True):
                if one:
                    mixed = mixed + max(c) * w * one / total * naive(attention, state, region.text[row, 0])
            assert (found[row, cell] - attention.to_out[0](mixed)).abs().max() < 1e-5


def test_pictures_of_a_batch_share_the_text_of_their_side(layer):
    hidden, text = drawn(6, ROWS * COLUMNS, 32), drawn(2, 1, TOKENS, DIM, seed=1)
    together, _ = through(layer, texts_of(["box", "soft"]), hidden, text)
    for first in range(3):
        alone, _ = through(layer, texts_of(["box", "soft"]), hidden[[first, first + 3]], text)
        assert torch.allclose(together[[first, first + 3]], alone, atol=1e-6)


def test_the_query_is_computed_once_and_so_is_the_output(layer):
    calls = []
    attention = layer.mid_block.attn2
    names = {attention.to_q: "q", attention.to_k: "k", attention.to_out[0]: "out"}

    def count(module, *_):
        calls.append(names[module])

    for module in names:
        module.register_forward_hook(count)
    hidden, text = drawn(2, ROWS * COLUMNS, 32), drawn(2, 1, TOKENS, DIM, seed=1)
    regions = texts_of(["box", "overlapping", "soft"])
    with regional(layer, text, regions, batch=2, columns=COLUMNS, rows=ROWS):
        assert calls == ["k"] * 4  # the texts' keys, once per picture
        for _ in range(3):
            attention(hidden, encoder_hidden_states=text)
    assert calls[4:] == ["q", "out"] * 3


@pytest.mark.parametrize(
    ("window", "there"),
    [((1, None), [1, 2, 3, 4]), ((2, 3), [2, 3]), ((4, 9), [4]), ((9, None), [])],
)
def test_a_region_is_there_in_its_steps_only(window, there, layer):
    hidden, text = drawn(2, ROWS * COLUMNS, 32), drawn(2, 1, TOKENS, DIM, seed=1)
    attention = layer.mid_block.attn2
    without, _ = through(layer, [], hidden, text)
    with_region, _ = through(layer, texts_of(["box"]), hidden, text)
    regions = texts_of(["box"], first_step=window[0], last_step=window[1])
    with regional(layer, text, regions, batch=2, columns=COLUMNS, rows=ROWS) as handle:
        for step in range(1, 5):
            handle.at(step)
            expected = with_region if step in there else without
            assert torch.equal(attention(hidden, encoder_hidden_states=text), expected)


def test_where_regions_cover_everything_the_global_prompt_is_not_read(layer):
    hidden = drawn(2, ROWS * COLUMNS, 32)
    regions = [RegionText(Shape(box=(0, 0, 1, 1)), drawn(2, 1, TOKENS, DIM, seed=5))]
    one, handle = through(layer, regions, hidden, drawn(2, 1, TOKENS, DIM, seed=1))
    other, _ = through(layer, regions, hidden, drawn(2, 1, TOKENS, DIM, seed=2))
    assert torch.equal(one, other)
    (_, pieces) = handle.plan[ROWS * COLUMNS]
    assert [piece.text for piece in pieces] == [1]


def test_isolated_regions_do_not_read_each_other(layer):
    left, right = Shape(box=(0, 0, 0.5, 1)), Shape(box=(0.5, 0, 1, 0.7))
    regions = [RegionText(shape, drawn(2, 1, TOKENS, DIM, seed=5)) for shape in (left, right)]
    hidden, text = drawn(2, ROWS * COLUMNS, 32), drawn(2, 1, TOKENS, DIM, seed=1)
    inside = {
        name: coverage(shape, columns=COLUMNS, rows=ROWS).flatten() > 0
        for name, shape in (("left", left), ("right", right))
    }
    attention, changed = layer.mid_block.attn1, hidden.clone()
    changed[:, inside["right"]] += 1
    with regional(layer, text, regions, batch=2, columns=COLUMNS, rows=ROWS, isolate=1) as handle:
        before, after = attention(hidden), attention(changed)
        assert torch.equal(before[:, inside["left"]], after[:, inside["left"]])
        outside = ~(inside["left"] | inside["right"])
        assert (before[:, outside] != after[:, outside]).all(-1).all()
        handle.at(2)
        assert not torch.equal(before, attention(hidden))
        whole = attention(hidden)
    assert torch.allclose(whole, attention(hidden), atol=1e-6)


@pytest.mark.parametrize("isolate", [0, 5])
def test_it_compiles_into_one_graph(isolate, layer):
    hidden, text = drawn(2, ROWS * COLUMNS, 32), drawn(2, 1, TOKENS, DIM, seed=1)
    regions = texts_of(["box", "overlapping", "soft"])
    with torch.no_grad(), regional(layer, text, regions, batch=2, columns=COLUMNS, rows=ROWS, isolate=isolate):
        expected = layer(hidden, text)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(hidden, text), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"qk_norm": "layer_norm"}, "norm_q, norm_k"),
        ({"norm_num_groups": 4}, "group_norm"),
        ({"residual_connection": True}, "residual_connection"),
        ({"rescale_output_factor": 2.0}, "rescale_output_factor"),
        ({"cross_attention_norm": "layer_norm"}, "norm_cross"),
    ],
)
def test_attention_of_other_kinds_is_refused(options, part):
    text = drawn(2, 1, TOKENS, DIM)
    with (
        pytest.raises(BaseModelError, match=f"mid_block.attn2: attention with {part} cannot"),
        regional(Layer(**options), text, [], batch=2, columns=COLUMNS, rows=ROWS),
    ):
        pass
