"""Compositions: written down, drawn, carried in the PNG, and drawn again to the same bytes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mixofshow import MixOfShowPipeline
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BadInputError, MixOfShowError, RegionError, SettingsError
from mixofshow.sampling.composition import compose, from_options, make_composition, variations
from mixofshow.sampling.drawing import draw_grid, draw_layout, draw_pictures
from mixofshow.sampling.pictures import embedded, read_picture
from mixofshow.sampling.regions import Region
from mixofshow.sampling.replay import PNG_KEY, composition_of, model_hash, read_note, replay

TABLE = {
    "prompt": "a castle",
    "width": 64,
    "height": 48,
    "steps": 2,
    "seed": 3,
    "isolate": 1,
    "regions": [
        {"prompt": "a <dogx>", "box": [0, 0, 32, 48], "weight": 2, "first_step": 1, "last_step": 2},
        {"prompt": "a <manx>", "polygon": [[30, 0], [64, 0], [64, 48]], "feather": 8, "strength": 0.5},
        {"prompt": "a bridge", "mask": "masks/low.png", "negative_prompt": "red"},
    ],
}


@pytest.fixture
def written(tmp_path):
    """The composition's YAML, with its mask beside it."""
    (tmp_path / "masks").mkdir()
    white = np.zeros((20, 30), np.uint8)
    white[12:] = 200
    Image.fromarray(white).save(tmp_path / "masks" / "low.png")
    (tmp_path / "composition.yaml").write_text(yaml.safe_dump(TABLE))
    return tmp_path / "composition.yaml"


def test_a_picture_is_replayed_to_the_same_bytes(draw, written, tmp_path):
    wanted = from_options(written, {"num": 2})
    targets = [tmp_path / "0.png", tmp_path / "1.png"]
    draw_pictures(draw, wanted, targets)
    (tmp_path / "masks" / "low.png").unlink()
    for number, target in enumerate(targets):
        assert composition_of(target).seed == 3 + number
        replay(draw, target, tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == target.read_bytes()
    assert targets[0].read_bytes() != targets[1].read_bytes()


def test_a_picture_to_start_from_is_replayed_too(draw, tmp_path):
    Image.effect_noise((64, 48), 90).save(tmp_path / "start.png")
    wanted = from_options(
        None, {"prompt": "a castle", "image": tmp_path / "start.png", "steps": "4", "isolate": "true"}
    )
    assert wanted.isolate is True
    draw_pictures(draw, wanted, [tmp_path / "0.png"])
    (tmp_path / "start.png").unlink()
    replay(draw, tmp_path / "0.png", tmp_path / "1.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_what_a_png_says_names_no_path(draw, written, tmp_path, golden_concepts):
    draw_pictures(draw, from_options(written, {}), [tmp_path / "0.png"])
    text = note_of(tmp_path / "0.png")
    assert str(tmp_path) not in text and "low.png" not in text
    _, maker = read_note(tmp_path / "0.png")
    assert maker.hash == model_hash(draw)
    assert maker.concepts == {one.info.name: one.hash for one in golden_concepts}
    assert maker.versions["torch"] == torch.__version__
    assert maker.threads == torch.get_num_threads()


def test_another_model_is_refused(draw, golden_pipeline, written, tmp_path):
    draw_pictures(draw, from_options(written, {}), [tmp_path / "0.png"])
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    weight = golden_pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
    other = MixOfShowPipeline.of(ConceptModel(golden_pipeline, draw.model.vocabulary, {layer: weight * 1.001}))
    with pytest.raises(SettingsError, match="drawn by another model, on base 'pipeline' with <dogx>, <manx>"):
        replay(other, tmp_path / "0.png", tmp_path / "1.png")
    assert not (tmp_path / "1.png").exists()


def note_of(path):
    with Image.open(path) as image:
        return image.info[PNG_KEY]


def pixels_of(path):
    with Image.open(path) as image:
        return np.array(image)


def with_note(path, note):
    info = PngInfo()
    info.add_text(PNG_KEY, note)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_other_versions_are_warned_of(draw, written, tmp_path, caplog):
    draw_pictures(draw, from_options(written, {}), [tmp_path / "0.png"])
    about = json.loads(note_of(tmp_path / "0.png"))
    about["maker"]["versions"]["torch"] = "1.0"
    with caplog.at_level(logging.WARNING):
        replay(draw, with_note(tmp_path / "old.png", json.dumps(about)), tmp_path / "1.png")
    assert "torch 1.0" in caplog.text


@pytest.mark.parametrize(
    "note",
    [
        "",
        "[]",
        "{",
        '{"composition": {}, "maker": {}}',
        '{"composition": {"prompt": "a", "oops": 1}, "maker": {}}',
        '{"composition": {"prompt": "a"}, "maker": {"base": "x"}}',
        '{"composition": {"prompt": "a", "regions": [{"prompt": "b", "mask": "/etc/hostname"}]}, "maker": {}}',
        '{"composition": {"prompt": "a", "image": "/etc/hostname"}, "maker": {}}',
        "[" * 100_000,
    ],
)
def test_strange_notes_are_refused(note, draw, tmp_path):
    with pytest.raises(MixOfShowError) as error:
        replay(draw, with_note(tmp_path / "strange.png", note), tmp_path / "out.png")
    assert "strange.png" in str(error.value) and "\n" not in str(error.value)


def test_pictures_without_a_note_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(SettingsError, match="carries no composition"):
        read_note(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadInputError, match="not a PNG"):
        read_note(tmp_path / "text.png")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"promt": "a"}, SettingsError, "unknown key 'promt'; did you mean 'prompt'"),
        (
            {"regions": [{"prompt": "a", "maks": "x"}]},
            SettingsError,
            "unknown key 'regions.0.maks'; did you mean 'mask'",
        ),
        ({"regions": [{"prompt": "a"}]}, RegionError, "a box, a polygon or a mask"),
        ({"regions": [{"prompt": "a", "mask": "none.png"}]}, BadInputError, "none.png: cannot be read"),
        (
            {"regions": [{"prompt": "a", "box": [0, 0, 1, 1], "weight": -1}]},
            SettingsError,
            "'regions.0.weight': .*found -1",
        ),
        ({"attend": 7}, SettingsError, "attend"),
        ({"seed": 2**63}, SettingsError, "'seed': expected a number below 2.63, found 9223372036854775808"),
        ({"width": int(1e308)}, SettingsError, "'width': .*found a number of 1024 bits"),
        (
            {"regions": [{"prompt": "a", "box": [0, 0, 1, 1], "front": -(2**63)}]},
            SettingsError,
            "'regions.0.front': expected a number below",
        ),
        ({"image": "none.png"}, BadInputError, "none.png: cannot be read"),
    ],
)
def test_refused_compositions(change, error, message, tmp_path):
    with pytest.raises(error, match=message) as raised:
        make_composition({"prompt": "a"} | change, "comp.yaml", tmp_path)
    assert "\n" not in str(raised.value)


def test_the_example_can_be_drawn():
    example = Path(__file__).parents[2] / "examples" / "compose-three.yaml"
    assert len(from_options(example, {}).regions) == 3


@pytest.mark.parametrize(
    ("picture", "mode", "expected"),
    [
        (Image.new("RGBA", (2, 1), (200, 100, 50, 0)), "RGB", (0, 0, 0)),
        (Image.new("RGBA", (2, 1), (200, 100, 50, 51)), "RGB", (40, 20, 10)),
        (Image.new("LA", (2, 1), (250, 0)), "L", 0),
        (Image.new("L", (2, 1), 250), "RGB", (250, 250, 250)),
    ],
)
def test_what_is_transparent_is_black_in_every_picture(picture, mode, expected, tmp_path):
    picture.save(tmp_path / "a.png")
    for source in (picture, tmp_path / "a.png", embedded(picture)):
        found = read_picture(source, mode)
        assert (found.mode, found.getpixel((0, 0))) == (mode, expected)


def test_a_grid_has_a_column_for_each_seed_and_a_row_for_each_value(draw, tmp_path):
    wanted = make_composition({"prompt": "a castle", "width": 64, "height": 48, "steps": 1, "num": 2})
    told = []
    draw_grid(draw, wanted, "guidance_scale=1,5,7", tmp_path / "grid.png", progress=lambda *one: told.append(one[:2]))
    assert told == [(number, 6) for number in range(1, 7)]
    pixels = pixels_of(tmp_path / "grid.png")
    (expected,) = compose(draw, wanted.model_copy(update={"num": 1, "guidance_scale": 7.0}))
    assert any(
        np.array_equal(pixels[top : top + 48, left : left + 64], np.array(expected))
        for top in range(pixels.shape[0] - 47)
        for left in range(pixels.shape[1] - 63)
    )
    draw_grid(draw, wanted, None, tmp_path / "seeds.png")
    assert len(pixels_of(tmp_path / "seeds.png")) < len(pixels) / 2


def test_variations_are_compositions():
    wanted = make_composition({"prompt": "a"})
    assert [(label, one.steps) for label, one in variations(wanted, "steps=1,20")] == [("steps 1", 1), ("steps 20", 20)]
    for text in ("stepz=1", "steps", "steps="):
        with pytest.raises(SettingsError, match="expected KEY=VALUE"):
            list(variations(wanted, text))
    with pytest.raises(SettingsError, match="steps"):
        list(variations(wanted, "steps=many"))


def test_the_layout_is_drawn_inside_the_regions_only():
    grey = Image.new("RGB", (512, 512), (128, 128, 128))
    box, half = Region("a", (64, 64, 256, 256)), Region("b", (300, 300, 500, 500), feather=64)
    drawn = np.array(draw_layout(grey, [box, half]))
    assert drawn.shape == (512, 512, 3)
    assert (drawn[400, 40] == 128).all()
    assert (drawn[200, 200] != 128).any()
    assert abs(int(drawn[400, 285, 1]) - 128) < abs(int(drawn[400, 400, 1]) - 128)
    assert draw_layout(Image.new("RGB", (64, 32)), []).size == (512, 256)
