"""A LoRA for each region in one pass, against concepts' own models and against whole weights, cell by cell."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from torch import nn

from mixofshow import MixOfShowPipeline, Region
from mixofshow.bases.families import family_of, token_width
from mixofshow.bases.layers import count_groups, kernel_of, layer, matrix, tunable_layers
from mixofshow.bases.loading import fingerprint
from mixofshow.concepts.changes import Full, LowRank
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.errors import BadInputError, BaseModelError, MixOfShowError, SettingsError
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.sampling.attention import RegionalAttention, RegionText
from mixofshow.sampling.composition import region_entry
from mixofshow.sampling.regions import Shape, area_coverage, coverage

ASKED = {
    "prompt": "two things",
    "width": 64,
    "height": 48,
    "num_inference_steps": 3,
    "seed": 0,
    "output_type": "latent",
}
LEFT, RIGHT, WHOLE = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1)


def changed_everywhere(concept, pipeline, seed, *, size=0.15, text=True):
    """The concept with a change of every layer that can be changed, some of low rank, some in full."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for number, (name, module) in enumerate(tunable_layers(pipeline).items()):
        if not text and not name.startswith("unet."):
            continue
        weight, kernel = matrix(module), kernel_of(module)
        scale = size * weight.norm() / weight.numel() ** 0.5
        (rows, columns), rank = weight.shape, 1 + number % 3
        if number % 5 == 0:
            deltas[name] = Full(scale * torch.randn(rows, columns, generator=generator), kernel)
        elif rank <= min(rows, columns):
            up, down = (torch.randn(*shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
            deltas[name] = LowRank(down, scale * up / rank**0.5, kernel)
    return replace(concept, deltas=deltas)


@pytest.fixture(scope="module")
def concepts(golden_pipeline, golden_concepts):
    return [changed_everywhere(one, golden_pipeline, seed) for seed, one in enumerate(golden_concepts)]


def unfused(pipeline, concepts):
    """The base, which knows the concepts' words and nothing else of them."""
    return ConceptModel(pipeline, vocabulary(concepts), concepts=concepts)


def test_in_a_region_of_the_whole_picture_a_concept_is_its_own_model(golden_pipeline, concepts, relative_error):
    asked = {**ASKED, "regions": [Region("a <dogx>", WHOLE)]}
    (expected,) = MixOfShowPipeline.of(with_concept(golden_pipeline, concepts[0]))(**asked)
    plain = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))
    (found,) = plain(**asked, regional_lora=True)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(plain(**asked)[0], expected) > 1e-2


def test_on_a_fused_model_too(golden_pipeline, concepts, relative_error):
    """What fusing made of the base is taken off again, and words that were moved are as they were."""
    fused = fuse(concepts, golden_pipeline, FusionSettings.of({"method": "average"})).model
    moved = {word: 1.5 * vector for word, vector in fused.vocabulary.embeddings.items()}
    fused = replace(fused, vocabulary=replace(fused.vocabulary, embeddings=moved))
    # What is outside of regions is drawn by the fused weights; the timestep's embedding is told in regions only.
    asked = {**ASKED, "regions": [Region("a <dogx>", WHOLE)]}
    (expected,) = MixOfShowPipeline.of(with_concept(golden_pipeline, concepts[0]))(**asked)
    (found,) = MixOfShowPipeline.of(fused)(**asked, regional_lora=True)
    assert relative_error(found, expected) < 1e-4


def test_a_base_of_another_family(xl_pipeline, golden_concepts, relative_error):
    """Two text encoders, and a picture's size that the UNet is told beside the timestep."""
    info = golden_concepts[0].info.model_copy(
        update={
            "family": family_of(xl_pipeline).name,
            "layers": count_groups(xl_pipeline.unet),
            "base_fingerprint": fingerprint(xl_pipeline),
        }
    )
    words = 0.1 * torch.randn(len(info.words), count_groups(xl_pipeline.unet), token_width(xl_pipeline))
    concept = changed_everywhere(replace(golden_concepts[0], info=info, embeddings=words), xl_pipeline, 3, text=False)
    asked = {**ASKED, "regions": [Region("a <dogx>", WHOLE)]}
    own, plain = (
        MixOfShowPipeline.of(one) for one in (with_concept(xl_pipeline, concept), unfused(xl_pipeline, [concept]))
    )
    # Text encoders left alone: the whole picture's prompt is read by the base's, a concept's own model has its own.
    (expected,), (found,) = own(**asked), plain(**asked, regional_lora=True)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(plain(**asked)[0], expected) > 1e-2


@contextlib.contextmanager
def whole_weights_by_cell(pipeline, concepts, boxes):
    """Independently: layers with each concept's whole weight beside the base's, their outputs put together by cells."""

    def patched(name, module, own):
        weights = [matrix(module) + one.deltas[name].matrix() for one in concepts]

        def forward(states):
            outputs = [own(states)]
            for weight in weights:
                kept, module.weight.data = module.weight.data, weight.view_as(module.weight)
                outputs.append(own(states))
                module.weight.data = kept
            result = outputs[0].clone()
            for made, (left, right) in zip(outputs[1:], boxes, strict=True):
                if made.ndim == 4:
                    columns = made.shape[-1]
                    part = (..., slice(round(left * columns), round(right * columns)))
                    result[part] = made[part]
                else:
                    columns = round((made.shape[1] * 4 / 3) ** 0.5)  # the picture is 4 : 3
                    grid, own_grid = (one.unflatten(1, (-1, columns)) for one in (result, made))
                    part = (slice(None), slice(None), slice(round(left * columns), round(right * columns)))
                    grid[part] = own_grid[part]
            return result

        return forward

    undo = []
    for name in concepts[0].deltas:
        if name.startswith("unet.") and not name.endswith((".attn2.to_k", ".attn2.to_v")):
            module = layer(pipeline, name)
            undo.append((module, module.forward))
            module.forward = patched(name, module, module.forward)
    try:
        yield
    finally:
        for module, own in undo:
            module.forward = own


def test_each_cell_is_drawn_by_its_own_regions_weights(golden_pipeline, golden_concepts, relative_error):
    """Words and text side left alone: what is compared is the picture's side, layer by layer."""
    concepts = [changed_everywhere(one, golden_pipeline, k, text=False) for k, one in enumerate(golden_concepts)]
    spatial = ("time_emb", "time_embedding", ".attn2.to_k", ".attn2.to_v")
    concepts = [
        replace(one, deltas={name: delta for name, delta in one.deltas.items() if not any(s in name for s in spatial)})
        for one in concepts
    ]
    plain = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))
    asked = {**ASKED, "width": 128, "height": 96, "num_inference_steps": 2}  # so that no map is one cell wide
    asked |= {"regions": [Region("a <dogx>", LEFT), Region("a <manx>", RIGHT)]}
    (found,) = plain(**asked, regional_lora=True)
    with whole_weights_by_cell(golden_pipeline, concepts, [(0, 0.5), (0.5, 1)]):
        (expected,) = plain(**asked)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(plain(**asked)[0], expected) > 1e-2


@pytest.mark.parametrize(("columns", "rows"), [(16, 12), (5, 3), (1, 1)])
def test_a_boxs_area_is_that_of_the_polygon_with_its_corners(columns, rows):
    left, top, right, bottom = box = (0.13, 0.2, 0.71, 0.9)
    corners = torch.tensor([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=torch.float64)
    found = area_coverage(Shape(box=box), columns=columns, rows=rows)
    assert torch.allclose(found, coverage(Shape(polygon=corners), columns=columns, rows=rows), atol=1e-5)
    assert abs(float(found.mean()) - (right - left) * (bottom - top)) < 1e-5


def test_outside_its_steps_a_region_changes_nothing(golden_pipeline, concepts):
    plain = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))
    late = [Region("a <dogx>", LEFT, first_step=3)]
    found = []
    for asked in ({"regional_lora": True}, {}):
        seen: list[torch.Tensor] = []

        def keep(_pipe, _step, _time, tensors, seen=seen):
            seen.append(tensors["latents"].clone())
            return {}

        plain(**ASKED, **asked, regions=late, callback_on_step_end=keep)
        found.append(seen)
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][2], found[1][2])


def test_regions_without_concepts_and_layers_without_changes_are_the_bases(golden_pipeline, concepts):
    plain = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))
    asked = {**ASKED, "regions": [Region("a castle", LEFT)]}
    assert torch.equal(plain(**asked, regional_lora=True)[0], plain(**asked)[0])
    hooks = [module for module in golden_pipeline.unet.modules() if module._forward_hooks or module._forward_pre_hooks]
    plain(**{**ASKED, "regions": [Region("a <dogx>", LEFT)]}, regional_lora=True)
    assert hooks == [one for one in golden_pipeline.unet.modules() if one._forward_hooks or one._forward_pre_hooks]


def test_several_concepts_in_one_region_are_added(golden_pipeline, concepts, relative_error):
    both = [Region("a <dogx> and a <manx>", WHOLE)]
    plain = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))
    (found,) = plain(**ASKED, regions=both, regional_lora=True)
    summed = fuse(concepts, golden_pipeline, FusionSettings.of({"method": "sum", "guard": False})).model
    (expected,) = MixOfShowPipeline.of(replace(summed, vocabulary=vocabulary(concepts)))(**ASKED, regions=both)
    assert relative_error(found, expected) < 1e-3


def test_what_is_missing_is_named(golden_pipeline, concepts, golden_fused):
    plain = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))
    with pytest.raises(SettingsError, match=r"the concepts themselves are needed.*manx"):
        plain(**ASKED, regions=[Region("a <manx>", LEFT)], regional_lora=concepts[:1])
    with pytest.raises(BadInputError, match="fused weights instead of those of base"):
        MixOfShowPipeline.of(replace(golden_fused, baked=True))(
            **ASKED, regions=[Region("a <dogx1>", LEFT)], regional_lora=concepts
        )


def test_gradients_pass_through(golden_pipeline, concepts):
    """As guided attention needs them."""
    plain = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))
    (found,) = plain(**ASKED, regions=[Region("a <dogx>", LEFT)], regional_lora=True, attend=0.1)
    assert torch.isfinite(found).all()
    assert isinstance(golden_pipeline.unet, nn.Module)


@pytest.fixture
def with_lora(golden_pipeline):
    """A base of its own with a LoRA that diffusers loaded, active for the whole picture."""
    base = copy.deepcopy(golden_pipeline)
    torch.manual_seed(1)
    base.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "conv1"]), "alice")
    return base


def test_a_loaded_adapter_draws_its_region_and_nothing_else(with_lora, golden_pipeline, relative_error):
    everywhere = {**ASKED, "regions": [Region("a castle", WHOLE)]}
    (expected,) = MixOfShowPipeline.of(ConceptModel(with_lora))(**everywhere)
    one = [Region("a castle", WHOLE, adapters={"alice": 1.0})]
    (found,) = MixOfShowPipeline.of(ConceptModel(with_lora))(**ASKED, regions=one)
    assert relative_error(found, expected) < 1e-4
    (without,) = MixOfShowPipeline.of(ConceptModel(golden_pipeline))(**everywhere)
    none = [Region("a castle", WHOLE, adapters={"alice": 0.0})]
    assert relative_error(MixOfShowPipeline.of(ConceptModel(with_lora))(**ASKED, regions=none)[0], without) < 1e-5
    (again,) = MixOfShowPipeline.of(ConceptModel(with_lora))(**everywhere)
    assert torch.equal(again, expected)  # active as before


def test_half_a_concept_by_its_adapters_strength(golden_pipeline, concepts, relative_error):
    """Of the changes; the words stay."""
    half = [Region("a <dogx>", WHOLE, adapters={"dogx": 0.5})]
    (found,) = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))(**ASKED, regions=half)
    own = MixOfShowPipeline.single(golden_pipeline, concepts[0], strength=0.5)
    assert relative_error(found, own(**ASKED, regions=[Region("a <dogx>", WHOLE)])[0]) < 1e-4


def test_an_unknown_adapter_is_named_with_those_there(with_lora):
    with pytest.raises(SettingsError, match=r"missing bob; there are alice"):
        MixOfShowPipeline.of(ConceptModel(with_lora))(**ASKED, regions=[Region("a man", LEFT, adapters={"bob": 1})])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,0,8,8: a girl <lora:alice:0.8> in red", ("a girl in red", {"alice": 0.8})),
        ("0,0,8,8: <lora:alice> a girl <lora:bob-v1.2:.5>", ("a girl", {"alice": 1.0, "bob-v1.2": 0.5})),
        ("0,0,8,8: a <dogx>", ("a <dogx>", None)),
    ],
)
def test_a1111s_mark_of_a_lora_in_a_regions_text(text, expected):
    found = region_entry(text)
    assert (found["prompt"], found.get("adapters")) == expected


def test_concepts_are_loaded_one_by_one(golden_pipeline, concepts, tmp_path, relative_error):
    base = MixOfShowPipeline.of(ConceptModel(golden_pipeline))
    everywhere = {**ASKED, "regions": [Region("a castle", LEFT)]}
    (plain,) = base(**everywhere)
    concepts[0].save(tmp_path / "dogx.safetensors")
    base.load_concept(tmp_path / "dogx.safetensors")
    (one,) = base(**everywhere)
    assert relative_error(one, MixOfShowPipeline.single(golden_pipeline, concepts[0])(**everywhere)[0]) < 1e-2  # halves
    base.load_concept(concepts[1])
    base.set_concepts("dogx", 0.5)
    (half,) = base(**everywhere)
    assert (
        relative_error(half, MixOfShowPipeline.single(golden_pipeline, concepts[0], strength=0.5)(**everywhere)[0])
        < 1e-2
    )
    base.set_concepts([])
    assert relative_error(base(**everywhere)[0], plain) < 1e-6
    with pytest.raises(SettingsError, match="set_concepts: expected some of dogx, manx, found dogx, cat"):
        base.set_concepts(["dogx", "cat"])
    base.unload_concepts()
    assert torch.equal(base(**everywhere)[0], plain)


def test_a_loaded_concept_that_a_region_draws_leaves_the_rest_of_the_picture(golden_pipeline, concepts, relative_error):
    """A third that no region names, such as a style, stays in all of it."""
    pipe = MixOfShowPipeline.of(ConceptModel(golden_pipeline))
    for one in concepts:
        pipe.load_concept(one)
    asked = {**ASKED, "regions": [Region("a <dogx>", LEFT)]}
    (found,) = pipe(**asked, regional_lora=True)
    style = ConceptModel(
        golden_pipeline, vocabulary(concepts), with_concept(golden_pipeline, concepts[1]).weights, tuple(concepts)
    )
    (expected,) = MixOfShowPipeline.of(style)(**asked, regional_lora=True)
    assert relative_error(found, expected) < 1e-4


def test_a_fused_model_takes_no_concept(golden_fused, concepts):
    with pytest.raises(BadInputError, match="this model is fused"):
        MixOfShowPipeline.of(golden_fused).load_concept(concepts[0])


def test_a_picture_whose_coarsest_maps_are_one_cell_each(golden_pipeline, concepts):
    """32 pixels are maps of 4, 2, 1 and 1 cells: two of one size."""
    asked = {**ASKED, "width": 32, "height": 32, "num_inference_steps": 1, "regions": [Region("a <dogx>", WHOLE)]}
    (found,) = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))(**asked, regional_lora=True)
    assert torch.isfinite(found).all()


def test_convolutions_pad_as_the_bases_own(golden_pipeline, concepts, relative_error):
    """Around the edge, for pictures that are to be tiled."""
    base = copy.deepcopy(golden_pipeline)
    for module in base.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    asked = {**ASKED, "num_inference_steps": 1, "regions": [Region("a <dogx>", WHOLE)]}
    (expected,) = MixOfShowPipeline.of(with_concept(base, concepts[0]))(**asked)
    (found,) = MixOfShowPipeline.of(unfused(base, concepts))(**asked, regional_lora=True)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoHaConfig(r=2, init_weights=False, target_modules=["to_q"]), "a LOHA, .*convert"),
        (LoraConfig(r=2, use_dora=True, target_modules=["to_q"]), "a DoRA, .*convert"),
        (
            LoraConfig(r=2, lora_bias=True, init_lora_weights=False, target_modules=["to_out.0"]),
            "biases.*whole picture",
        ),
    ],
)
def test_an_adapter_that_is_more_than_two_factors_is_refused(golden_pipeline, config, said):
    """Before, LoHa stayed on everywhere, and biases were lost."""
    base = copy.deepcopy(golden_pipeline)
    base.unet.add_adapter(config, "alice")
    with pytest.raises(BaseModelError, match=said):
        MixOfShowPipeline.of(ConceptModel(base))(**ASKED, regions=[Region("a man", LEFT, adapters={"alice": 1})])


def test_concepts_that_were_loaded_stay_loaded_in_another_pipeline(golden_pipeline, concepts):
    first = MixOfShowPipeline.of(ConceptModel(golden_pipeline))
    first.load_concept(concepts[0])
    other = MixOfShowPipeline.from_pipe(first)
    other.load_concept(concepts[1])
    assert [one.info.name for one in other.model.concepts] == ["dogx", "manx"]
    other.unload_concepts()
    assert not other.model.concepts and not other.model.weights
    assert [one.info.name for one in first.model.concepts] == ["dogx"]


def test_regions_that_meet_inside_a_cell_cover_it_together():
    """Half of the single cell each; the whole picture's prompt has none of it."""
    like = torch.zeros(0)
    halves = [RegionText(Shape(box=box), torch.zeros(1, 1, 1, 1)) for box in (LEFT, RIGHT)]
    handle = RegionalAttention(halves, [(1, 1)], like=like, isolate=0, tiny="nearest")
    assert handle.share(1).flatten().tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, one: pipe.load_concept(one, "0.5"), "load_concept: expected finite numbers"),
        (lambda pipe, one: pipe.set_concepts(["dogx"], [float("nan")]), "set_concepts: expected finite numbers"),
        (lambda pipe, one: pipe.set_concepts(["dogx"], None), "set_concepts: expected finite numbers"),
        (lambda pipe, one: pipe.set_concepts(["dogx", "dogx"]), "each name once"),
        (lambda pipe, one: pipe(**ASKED, regional_lora=one), "regional_lora: expected True, False, or a list"),
        (lambda pipe, one: Region("a", LEFT, adapters={"a": "x"}), "'adapters.a': input should be a valid number"),
        (lambda pipe, one: Region("a", LEFT, adapters=["a"]), "'adapters': input should be a table"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(call, message, golden_pipeline, concepts):
    pipe = MixOfShowPipeline.of(ConceptModel(golden_pipeline))
    pipe.load_concept(concepts[0])
    with pytest.raises(MixOfShowError, match=message):
        call(pipe, concepts[1])


def test_no_other_picture_is_drawn_amid_one(golden_pipeline, concepts):
    pipe = MixOfShowPipeline.of(unfused(golden_pipeline, concepts))

    def another(*_):
        pipe(**ASKED)
        return {}

    asked = {**ASKED, "regions": [Region("a <dogx>", LEFT)], "regional_lora": True}
    with pytest.raises(SettingsError, match="draw others after it"):
        pipe(**asked, callback_on_step_end=another)
    assert torch.isfinite(pipe(**asked)[0]).all()
