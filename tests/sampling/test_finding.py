"""Regions without boxes: where places are looked for, what is drawn in them, and how it is said and written down."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from PIL import Image

from mixofshow import MixOfShowPipeline, Region
from mixofshow.errors import MixOfShowError, RegionError, SettingsError
from mixofshow.sampling.composition import compose, from_options, make_composition
from mixofshow.sampling.conditioning import encode, without_concepts
from mixofshow.sampling.denoising import noise_predictor
from mixofshow.sampling.drawing import draw_pictures
from mixofshow.sampling.finding import PlaceFinder, clean, coarse, with_wanted
from mixofshow.sampling.inputs import check_inputs
from mixofshow.sampling.pictures import read_picture
from mixofshow.sampling.regions import coverage, shape_of
from mixofshow.sampling.replay import composition_of, replay

PROMPT = "a <dogx> and a <manx> near the castle"
ASKED = {"prompt": PROMPT, "width": 64, "height": 48, "num_inference_steps": 5, "first_pass": 0.4, "seed": 0}
BY_HAND = Region("a <manx>", (0, 0, 24, 48))


@pytest.fixture(params=[False, True], ids=["fused", "regional_lora"])
def regional_lora(request):
    return request.param


def place(region, width=16, height=12):
    return coverage(shape_of(region, width=64, height=48), columns=width, rows=height)


def test_the_picture_is_that_of_the_regions_that_were_found(draw, regional_lora):
    found = draw(**ASKED, regions="auto", regional_lora=regional_lora, output_type="latent")
    (layout,) = found.layouts
    assert layout.prompt == "a object and a object near the castle"
    assert [one.prompt for one in layout.regions] == [
        "a <dogx> and a object near the castle",
        "a object and a <manx> near the castle",
    ]
    assert all(one.first_step == 3 and not one.auto for one in layout.regions)
    assert not (place(layout.regions[0]) * place(layout.regions[1])).any()
    again = draw(
        **{**ASKED, "prompt": layout.prompt}, regions=layout.regions, regional_lora=regional_lora, output_type="latent"
    )
    assert torch.equal(found.images, again.images)
    assert again.layouts == []


def test_the_first_steps_are_those_of_class_words(draw):
    seen = {"auto": [], "plain": []}

    def keep(name):
        return lambda pipeline, step, timestep, tensors: seen[name].append(tensors["latents"]) or {}

    draw(**ASKED, regions="auto", callback_on_step_end=keep("auto"))
    draw(**{**ASKED, "prompt": without_concepts(draw.model, PROMPT)}, callback_on_step_end=keep("plain"))
    same = [torch.equal(one, other) for one, other in zip(seen["auto"], seen["plain"], strict=True)]
    assert same == [True, True, False, False, False]


def test_predictions_are_those_with_one_concept_alone(draw, relative_error):
    inputs = check_inputs(draw, _call(regions="auto", regional_lora=False))
    model = draw.model
    inputs = replace(inputs, regions=with_wanted(model, PROMPT, (), True))
    finder = PlaceFinder(draw, model, inputs, {})
    state, timestep = torch.randn(1, 4, 6, 8), torch.tensor(700)
    with model.active():
        found = finder._predicted(state, timestep)
        prompts = [without_concepts(model, PROMPT), *(one.prompt for one in inputs.regions)]
        for prompt, of_prompt in zip(prompts, found, strict=True):
            encoded = encode(model, prompt, "", (), width=64, height=48, guided=False)
            with noise_predictor(draw, encoded, state) as predict:
                assert relative_error(of_prompt[None], predict(state, timestep, 1, {})) < 1e-5
    assert relative_error(found[1], found[0]) > 1e-3


def _call(**more):
    """The pipeline's arguments by name, as it hands them on."""
    signature = inspect.signature(MixOfShowPipeline.__call__)
    given = {name: one.default for name, one in signature.parameters.items() if name not in ("self", "return_dict")}
    named = {name: value for name, value in ASKED.items() if name != "first_pass"}
    return {**given, "settings": {"first_pass": 0.4}, **named, **more}


def test_several_pictures_each_have_their_own_places(draw):
    asked = {**ASKED, "prompt": [PROMPT, "a <dogx> in the snow"], "regions": "auto", "output_type": "latent"}
    found = draw(**asked, num_images_per_prompt=2)
    assert [len(one.regions) for one in found.layouts] == [2, 2, 1, 1]
    alone = draw(**{**asked, "prompt": "a <dogx> in the snow", "seed": 2})
    assert torch.equal(found.images[2:3], alone.images)


def test_boxes_by_hand_for_some(draw):
    found = draw(**ASKED, regions=[BY_HAND, "auto"])
    by_hand, other = found.layouts[0].regions
    assert by_hand == BY_HAND
    assert other.prompt == "a <dogx> and a object near the castle"
    assert not place(other)[:, :6].any()


def test_a_region_of_ones_own_words_whose_place_is_found(draw):
    asked = Region("red <dogx>", auto=True, weight=2, strength=0.5)
    (layout,) = draw(**ASKED, regions=[asked]).layouts
    (region,) = layout.regions
    assert (region.prompt, region.weight, region.strength) == ("red <dogx>", 2, 0.5)
    # The other concept has no region, so that it stays in the whole picture's prompt.
    assert layout.prompt == "a object and a <manx> near the castle"


def test_what_finds_no_place_is_said_and_drawn_as_its_class_word(draw, caplog):
    with caplog.at_level(logging.WARNING):
        (layout,) = draw(**ASKED, regions="auto", smallest_place=0.5, largest_place=0.9).layouts
    assert len(layout.regions) == 1
    (said,) = [one.getMessage() for one in caplog.records if "found no place" in one.getMessage()]
    assert said.startswith(("<dogx> found no place", "<manx> found no place")) and "\n" not in said
    assert "<" not in layout.prompt


def test_with_a_picture_to_start_from_and_enlarged(draw):
    start = Image.effect_noise((64, 48), 90).convert("RGB")
    found = draw(**ASKED, regions="auto", image=start, strength=0.8, upscale=2)
    assert found[0].size == (128, 96)
    assert all(one.first_step == 4 for one in found.layouts[0].regions)  # of steps 2 to 5, the first two


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"prompt": "a castle", "regions": "auto"}, SettingsError, "names no concept without a region"),
        ({"regions": [Region("a <dogx>", (0, 0, 9, 9)), BY_HAND, "auto"]}, SettingsError, "names no concept without"),
        ({"regions": "all"}, RegionError, "expected a list of regions, found str; or 'auto'"),
        ({"regions": [Region("a castle", auto=True)]}, RegionError, "expected one concept in its prompt"),
        ({"regions": [Region("<dogx>, <manx>", auto=True)]}, RegionError, "found dogx, manx"),
        (
            {"prompt": "a <dogx>", "regions": [Region("a <manx>", auto=True)]},
            RegionError,
            "does not name <manx>, so that its place cannot be found",
        ),
        (
            {"regions": [Region("a <dogx>", auto=True, last_step=2)], "first_pass": 0.4},
            RegionError,
            "last_step: expected a step from 3 to 5, which are done, found 2",
        ),
        ({"regions": "auto", "first_pass": 0.95}, SettingsError, "first_pass: expected less than all of the 5 steps"),
        ({"regions": "auto", "first_pass": 1.5}, SettingsError, "first_pass"),
        ({"regions": "auto", "smallest_place": 0.5}, SettingsError, "`smallest_place`: expected at most `largest_place`"),
    ],
)
def test_what_cannot_be_meant_is_one_line(asked, error, said, draw):
    with pytest.raises(error) as found:
        draw(**{**ASKED, **asked})
    assert said in str(found.value) and "\n" not in str(found.value)


def test_a_region_has_a_place_or_finds_one():
    with pytest.raises(RegionError, match="only one of them"):
        Region("a <dogx>", (0, 0, 1, 1), auto=True)
    assert Region.parse("auto: a <dogx>") == Region("a <dogx>", auto=True)


TABLE = {"prompt": PROMPT, "width": 64, "height": 48, "steps": 5, "first_pass": 0.4, "seed": 3}


@pytest.mark.parametrize(
    ("regions", "auto", "rest"),
    [
        ("auto", True, 0),
        (["auto", {"prompt": "a <manx>", "box": [0, 0, 24, 48]}], True, 1),
        ([{"prompt": "a <manx>", "auto": True}], False, 1),
    ],
)
def test_yaml_says_it_as_python_does(regions, auto, rest):
    made = make_composition({**TABLE, "regions": regions})
    assert (made.auto, len(made.regions)) == (auto, rest)
    assert make_composition(made.model_dump(mode="json")) == made


def test_pictures_are_replayed_and_regions_saved_edited_and_used_again(draw, tmp_path):
    wanted = from_options(None, {**TABLE, "auto": True, "num": 2})
    targets = [tmp_path / "0.png", tmp_path / "1.png"]
    files = {"layout": tmp_path / "layout.png", "regions": tmp_path / "found.yaml"}
    draw_pictures(draw, wanted, targets, **files)
    assert read_picture(files["layout"], "RGB").size == (512, 384)
    for target in targets:
        carried = composition_of(target)
        assert not carried.auto and len(carried.regions) == 2
        replay(draw, target, tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == target.read_bytes()
    table = yaml.safe_load(files["regions"].read_text())
    assert [one["mask"] for one in table["regions"]] == ["found-region-1.png", "found-region-2.png"]
    saved = from_options(files["regions"], {})
    (again,) = compose(draw, saved)
    assert again.tobytes() == read_picture(targets[0], "RGB").tobytes()
    Image.new("L", (64, 48), "white").save(tmp_path / "found-region-1.png")
    (edited,) = compose(draw, from_options(files["regions"], {}))
    assert edited.tobytes() != again.tobytes()
    with pytest.raises(MixOfShowError, match=r"found-region-1\.png: there is a file that is no PNG of this program"):
        draw_pictures(draw, saved, targets[:1], **files)
    (tmp_path / "found-region-1.png").unlink()
    draw_pictures(draw, saved, targets[:1], **files)  # over what was written before


def test_regions_are_not_saved_over_a_yaml_of_ones_own(draw, tmp_path):
    (tmp_path / "mine.yaml").write_text("prompt: a castle\n")
    with pytest.raises(MixOfShowError, match="no YAML of this program"):
        draw_pictures(draw, from_options(None, {**TABLE, "auto": True}), [tmp_path / "0.png"], regions=tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "prompt: a castle\n"


def test_strengths_of_a_control_by_region_are_refused_where_places_are_unknown():
    control = {"network": "emojiland-t2i-adapter", "picture": "a.png", "regions": [1.0]}
    with pytest.raises(SettingsError, match="expected none where places are found"):
        make_composition({**TABLE, "regions": [{"prompt": "a <manx>", "auto": True}], "controls": [control]})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_draft_is_what_a_perfect_prediction_comes_from(kind):
    scheduler = DDIMScheduler(prediction_type=kind)
    picture, noise = torch.randn(2, 4, 6, 8)
    timestep = torch.tensor(600)
    noisy = scheduler.add_noise(picture[None], noise[None], timestep[None])
    perfect = {"epsilon": noise, "v_prediction": scheduler.get_velocity(picture[None], noise[None], timestep[None])[0]}
    found = clean(scheduler, noisy, perfect.get(kind, picture)[None], timestep)
    assert torch.allclose(found[0], picture, atol=1e-4)


def test_fine_maps_are_made_coarser_without_losing_anything():
    maps = torch.rand(2, 3, 128, 192)
    found = coarse(maps)
    assert found.shape == (2, 3, 32, 48)
    assert torch.allclose(found.mean((2, 3)), maps.mean((2, 3)), atol=1e-6)
