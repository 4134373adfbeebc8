"""Sampling and regions give the reference's latents, picture and attention (golden parts c and d)."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch

from mixofshow.bases.layers import cross_attentions
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import with_concept
from mixofshow.concepts.prompts import encode_prompts
from mixofshow.sampling.attention import regional
from mixofshow.sampling.conditioning import EncodedPrompt, encode
from mixofshow.sampling.denoising import denoise
from mixofshow.sampling.latents import decode
from mixofshow.sampling.regions import Region, as_shares, cells

TOLERANCE, SAMPLING_TOLERANCE = 1e-5, 1e-4
WIDE = {"width": 192, "height": 128}
SQUARE = {"width": 128, "height": 128}


@contextmanager
def latents_seen(unet):
    """The latents that the UNet is given at each step, first row only."""
    seen = []
    handle = unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:1].clone()))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(("shape", "size"), [("sq", SQUARE), ("wide", WIDE)])
@torch.no_grad()
def test_sampling_a_concept(shape, size, golden, golden_pipeline, golden_concepts, relative_error):
    expected = golden("c_sample")
    values = expected.values
    model = with_concept(golden_pipeline, golden_concepts[0], values["alpha"])
    with model.active(), latents_seen(golden_pipeline.unet) as seen:
        encoded = encode(model, values["prompt"], values["negative_prompt"], (), **size, guided=True)
        found = denoise(
            golden_pipeline, expected[f"latents_init_{shape}"], encoded, num_inference_steps=8, guidance_scale=7.5
        )
    assert relative_error(found, expected[f"latents_final_{shape}"]) < SAMPLING_TOLERANCE
    assert relative_error(torch.cat([*seen[1:], found]), expected[f"latents_steps_{shape}"]) < SAMPLING_TOLERANCE


@torch.no_grad()
def test_sampling_two_prompts_at_once(golden, golden_pipeline, golden_concepts, relative_error):
    expected, prompts = golden("c_sample"), golden("a_text").values["prompts"][:2]
    start = expected["latents_init_sq"]
    model = with_concept(golden_pipeline, golden_concepts[0])
    with model.active():
        text = encode_prompts(
            golden_pipeline, [expected.values["negative_prompt"]] * 2 + prompts, model.vocabulary
        ).hidden
        found = denoise(
            golden_pipeline,
            torch.cat([start, start.flip(-1)]),
            EncodedPrompt(text, (), guided=True),
            num_inference_steps=8,
            guidance_scale=7.5,
        )
    assert relative_error(found, expected["latents_final_batch2_alpha1.0"]) < SAMPLING_TOLERANCE


@torch.no_grad()
def test_sampling_without_guidance(golden, golden_pipeline, golden_concepts, relative_error):
    expected, prompt = golden("c_sample"), golden("a_text").values["prompts"][0]
    model = with_concept(golden_pipeline, golden_concepts[0])
    with model.active():
        encoded = encode(model, prompt, "never read", (), **SQUARE, guided=False)
        found = denoise(
            golden_pipeline, expected["latents_init_sq"], encoded, num_inference_steps=20, guidance_scale=1.0
        )
    assert relative_error(found, expected["latents_final_nocfg20_alpha1.0"]) < SAMPLING_TOLERANCE


@torch.no_grad()
def test_the_picture(golden, golden_pipeline):
    expected = golden("c_sample")
    (picture,) = decode(golden_pipeline, expected["latents_final_sq"])
    assert np.abs(np.array(picture, dtype=int) - expected["image_sq_uint8"][0].numpy()).max() <= 1


def regions_of(rewrite: str) -> list[Region]:
    """From the reference's "[prompt]-*-[negative]-*-[top, left, bottom, right]|…"; [] is the whole picture."""
    regions = []
    for part in rewrite.split("|"):
        prompt, negative, box = (text[1:-1] for text in part.split("-*-"))
        top, left, bottom, right = json.loads(f"[{box or '0, 0, 1, 1'}]")
        regions.append(Region(prompt, (left, top, right, bottom), negative))
    return regions


def as_reference(unet, encoded):
    """Regional attention that drops a region where it covers no cell, as the reference does."""
    return regional(unet, encoded.text, encoded.regions, batch=2, columns=24, rows=16, tiny="drop")


@pytest.fixture
def composed(golden, golden_fused):
    """Encode the golden composition, by the name of its list of regions."""
    values = golden("d_region").values
    lists = {
        "regions": regions_of(values["prompt_rewrite"]),
        "whole": regions_of(values["prompt_rewrite_whole"]),
        "none": [],
    }

    def encoded(name: str) -> EncodedPrompt:
        with torch.no_grad(), golden_fused.active():
            return encode(
                golden_fused,
                values["context_prompt"],
                values["context_negative"],
                lists[name],
                **WIDE,
                guided=True,
            )

    return encoded


def test_words_of_the_fused_model(golden, golden_concepts):
    rows = golden("e_fused")["text_encoder.new_token_embedding"]
    assert torch.equal(torch.cat(list(vocabulary(golden_concepts).embeddings.values())), rows)


def test_texts_of_regions(golden, composed, relative_error):
    expected, found = golden("d_region"), composed("regions")
    pairs = {"context_neg": found.text[0, 0], "context_pos": found.text[1], "region0_pos": found.regions[0].text[1]}
    pairs |= {f"region{k}_neg": region.text[0, 0] for k, region in enumerate(found.regions)}
    pairs |= {f"region{k}_pos_layers_0_7_15": found.regions[k].text[1, [0, 7, 15]] for k in (1, 2)}
    for key, text in pairs.items():
        assert relative_error(text, expected[key]) < TOLERANCE, key


@pytest.mark.parametrize(
    ("key", "regions", "timestep"),
    [
        ("noise_t10", "regions", 10),
        ("noise_t500", "regions", 500),
        ("noise_t900", "regions", 900),
        ("noise_t500_noregion", "none", 500),
        ("noise_t500_whole", "whole", 500),
    ],
)
@torch.no_grad()
def test_regional_noise(key, regions, timestep, golden, golden_fused, composed, relative_error):
    expected, encoded, unet = golden("d_region"), composed(regions), golden_fused.pipeline.unet
    with golden_fused.active(), as_reference(unet, encoded):
        found = unet(expected["latents_wide"].repeat(2, 1, 1, 1), timestep, encoded.text).sample
    assert relative_error(found, expected[key]) < TOLERANCE


@pytest.mark.parametrize(
    "where",
    ["down_blocks.0.attentions.0", "down_blocks.1.attentions.1", "up_blocks.1.attentions.2", "mid_block.attentions.0"],
)
@torch.no_grad()
def test_regional_attention_at_every_resolution(where, golden, golden_fused, composed, relative_error):
    expected, encoded, unet = golden("d_region"), composed("regions"), golden_fused.pipeline.unet
    attention = cross_attentions(unet)[f"{where}.transformer_blocks.0.attn2"]
    with golden_fused.active(), as_reference(unet, encoded):
        found = attention(expected[f"attn2_in.{where}"], encoder_hidden_states=encoded.text)
    assert relative_error(found, expected[f"attn2_out.{where}"]) < TOLERANCE


@torch.no_grad()
def test_regional_sampling(golden, golden_fused, composed, relative_error):
    expected, unet = golden("d_region"), golden_fused.pipeline.unet
    with golden_fused.active(), latents_seen(unet) as seen:
        found = denoise(
            golden_fused.pipeline,
            expected["latents_wide"],
            composed("regions"),
            num_inference_steps=8,
            guidance_scale=7.5,
            tiny="drop",
        )
    assert relative_error(torch.cat([*seen[1:], found]), expected["sample_steps"]) < SAMPLING_TOLERANCE


@torch.no_grad()
def test_fused_model_draws_all_concepts(golden, golden_fused, relative_error):
    expected, values = golden("e_fused_use"), golden("c_sample").values
    with golden_fused.active():
        encoded = encode(golden_fused, expected.values["prompt"], values["negative_prompt"], (), **SQUARE, guided=True)
        found = denoise(
            golden_fused.pipeline, golden("b_unet")["latents_sq"], encoded, num_inference_steps=8, guidance_scale=7.5
        )
    assert relative_error(encoded.text[1:, [0, 5, 15]], expected["embeds_layers_0_5_15"]) < TOLERANCE
    assert relative_error(found, expected["latents_final_sq"]) < SAMPLING_TOLERANCE


def test_boxes_are_rounded_as_in_the_reference(request):
    """But that an edge between two cells stays there, which the reference's doubles may put beside it (B19)."""
    table = json.loads((request.config.rootpath / "tests/goldens/d_box_rounding.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    assert len(table) == 77
    for row in table:
        top, left, bottom, right = row["box"]
        share = as_shares(Region("", (left, top, right, bottom)), width=row["width"], height=row["height"])
        for size, expected in row["cells"].items():
            rows, columns = map(int, size.split("x"))
            area = cells(share, columns=columns, rows=rows)
            found = [] if area[0] >= area[2] or area[1] >= area[3] else [area[1], area[0], area[3], area[2]]
            across, down = Fraction(columns, row["width"]), Fraction(rows, row["height"])
            places = [edge * scale for edge, scale in ((top, down), (left, across), (bottom, down), (right, across))]
            between = any(place.denominator == 1 for place in places)
            exact = [math.ceil(places[0]), math.ceil(places[1]), math.floor(places[2]), math.floor(places[3])]
            assert found in ([], exact)
            assert found == expected or between, (row, size)
