"""Controls of a composition: opened as they are written, carried by hash in the PNG, drawn again to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch
import yaml
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image

from mixofshow import MixOfShowPipeline, Region
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import MixOfShowError, SettingsError
from mixofshow.sampling.composition import compose, from_options, make_composition, variations
from mixofshow.sampling.controls import load_control, make_control, network_hash
from mixofshow.sampling.drawing import draw_pictures
from mixofshow.sampling.replay import composition_of, read_note, replay
from mixofshow.sampling.steering import open_controls

WIDTH, HEIGHT = 64, 48
TABLE = {
    "prompt": "a castle",
    "width": WIDTH,
    "height": HEIGHT,
    "steps": 4,
    "regions": [{"prompt": "a bridge", "box": [0, 0, 32, 48]}, {"prompt": "a man", "box": [32, 16, 64, 48]}],
    "controls": [
        {"network": "adapter", "picture": "sketch.png", "strength": 0.7, "end": 0.5, "regions": [2, 0], "outside": 0.5},
        {"network": "controlnet", "picture": "sketch.png", "start": 0.25, "strength_map": "map.png"},
    ],
}


@pytest.fixture(scope="module")
def networks(golden_pipeline, tmp_path_factory):
    """A folder with an adapter and a ControlNet that add something."""
    folder, unet = tmp_path_factory.mktemp("networks"), golden_pipeline.unet
    torch.manual_seed(0)
    factor = golden_pipeline.vae_scale_factor
    channels = list(unet.config.block_out_channels)
    T2IAdapter(channels=channels, num_res_blocks=1, downscale_factor=factor).save_pretrained(folder / "adapter")
    embedding = (16, 32, 48, 64)[: factor.bit_length()]
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=embedding)
    for name, values in controlnet.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(values, std=0.1)
    controlnet.save_pretrained(folder / "controlnet")
    return folder


@pytest.fixture
def written(networks, tmp_path, monkeypatch):
    """The composition's YAML with its files beside it, below the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("adapter", "controlnet"):
        (folder / name).symlink_to(networks / name)
    Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB").save(folder / "sketch.png")
    Image.fromarray(np.linspace(0, 255, 30).astype(np.uint8).reshape(5, 6)).save(folder / "map.png")
    (folder / "composition.yaml").write_text(yaml.safe_dump(TABLE))
    return folder / "composition.yaml"


@pytest.fixture
def draw(golden_pipeline):
    return MixOfShowPipeline.of(ConceptModel(golden_pipeline))


def pixels(image):
    return np.array(image)


def test_a_composition_draws_what_its_controls_draw_by_hand(draw, written):
    (found,) = compose(draw, from_options(written, {}))
    folder = written.parent
    # By cells of the latents, which these boxes fill exactly: 0.5 beside the regions.
    factor = draw.vae_scale_factor
    strengths = np.full((HEIGHT // factor, WIDTH // factor), 0.5, np.float32)
    strengths[:, : 32 // factor] = 2
    strengths[16 // factor :, 32 // factor :] = 0
    by_hand = [
        make_control(
            load_control(folder / "adapter"), folder / "sketch.png", strength=0.7, end=0.5, strength_map=strengths
        ),
        make_control(
            load_control(folder / "controlnet"), folder / "sketch.png", start=0.25, strength_map=folder / "map.png"
        ),
    ]
    regions = [Region("a bridge", (0, 0, 32, 48)), Region("a man", (32, 16, 64, 48))]
    asked = {"regions": regions, "width": WIDTH, "height": HEIGHT, "num_inference_steps": 4, "seed": 0}
    (expected,) = draw("a castle", controls=by_hand, **asked)
    assert np.array_equal(pixels(found), pixels(expected))
    for controls in ([], by_hand[:1], by_hand[1:]):
        (other,) = draw("a castle", controls=controls, **asked)
        assert not np.array_equal(pixels(found), pixels(other))


def test_a_controlled_picture_is_replayed_to_the_same_bytes(draw, written, tmp_path):
    wanted = from_options(written, {"num": 2})
    targets = [tmp_path / "0.png", tmp_path / "1.png"]
    draw_pictures(draw, wanted, targets)
    (written.parent / "map.png").unlink()  # the map is in the PNG, the picture is not
    (tmp_path / "elsewhere").mkdir()
    for target in targets:
        replay(draw, target, tmp_path / "elsewhere" / "again.png")
        assert (tmp_path / "elsewhere" / "again.png").read_bytes() == target.read_bytes()


def test_a_png_says_which_files_its_controls_are(draw, written, tmp_path):
    draw_pictures(draw, from_options(written, {}), [tmp_path / "0.png"])
    adapter, controlnet = composition_of(tmp_path / "0.png").controls
    assert adapter.picture == os.path.join("work", "sketch.png")
    assert adapter.picture_hash == hashlib.sha256((written.parent / "sketch.png").read_bytes()).hexdigest()
    assert (adapter.strength, adapter.end, adapter.regions, adapter.outside) == (0.7, 0.5, (2, 0), 0.5)
    assert controlnet.network_hash == network_hash(written.parent / "controlnet") != adapter.network_hash
    assert str(tmp_path) not in json.dumps(read_note(tmp_path / "0.png")[0].model_dump(mode="json"))


def replace_network(folder, networks):
    (folder / "adapter").unlink()
    (folder / "adapter").mkdir()
    for path in (networks / "adapter").iterdir():
        (folder / "adapter" / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter" / "config.json").read_text())
    (folder / "adapter" / "config.json").write_text(json.dumps(config | {"adapter_type": "full_adapter_xl"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, _: (folder / "sketch.png").unlink(), r"work/sketch\.png: cannot be read \(No such file"),
        (
            lambda folder, _: Image.new("RGB", (8, 8)).save(folder / "sketch.png"),
            r"work/sketch\.png: another picture than before, expected hash",
        ),
        (lambda folder, _: (folder / "adapter").unlink(), "control 'work/adapter': no folder with the config.json"),
        (replace_network, "control 'work/adapter': another network than before, expected hash"),
    ],
)
def test_without_the_same_files_replay_names_what_it_misses(change, message, draw, written, networks, tmp_path):
    draw_pictures(draw, from_options(written, {}), [tmp_path / "0.png"])
    change(written.parent, networks)
    with pytest.raises(MixOfShowError, match=message) as error:
        replay(draw, tmp_path / "0.png", tmp_path / "1.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "1.png").exists()


def test_controls_as_options_are_those_of_the_yaml(written):
    inside = from_options(written, {}).controls
    texts = [
        "network: work/adapter, picture: work/sketch.png, strength: 0.7, end: 0.5, regions: [2, 0], outside: 0.5",
        "network: work/controlnet, picture: work/sketch.png, start: 0.25, strength_map: work/map.png",
    ]
    assert from_options(written, {"controls": texts}).controls == inside
    plain = {key: value for key, value in TABLE.items() if key not in ("controls", "regions")}
    assert len(from_options(None, plain | {"controls": texts[1:]}).controls) == 1


def test_an_embedded_control_is_known_by_its_name(written):
    text = "network: emojiland-t2i-adapter, picture: work/sketch.png"
    (found,) = from_options(written, {"controls": [text]}).controls
    assert found.network == "emojiland-t2i-adapter"
    assert found.network_hash == network_hash("emojiland-t2i-adapter")


def test_a_composition_may_demand_a_hash(written):
    control = TABLE["controls"][0] | {"picture_hash": "0" * 64}
    with pytest.raises(SettingsError, match="another picture than before, expected hash 00000000000"):
        make_composition(TABLE | {"controls": [control]}, "comp.yaml", written.parent)


def test_controls_stay_when_a_setting_is_varied(draw, written):
    wanted = from_options(written, {})
    (_, one), (_, other) = variations(wanted, "steps=1,2")
    assert one.controls == other.controls == wanted.controls
    opened = open_controls(one, draw, (WIDTH, HEIGHT))
    assert [(control.strength, control.start, control.end) for control in opened] == [(0.7, 0, 0.5), (1, 0.25, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"netwrk": "x"}, "unknown key 'controls.0.netwrk'"),
        ({"picture": "none.png"}, "none.png: cannot be read"),
        ({"network": "none"}, "no folder with the config.json of a network; known by name are emojiland-t2i"),
        ({"network": "emojiland-t2i-adaptor"}, "did you mean 'emojiland-t2i-adapter'"),
        ({"strength": 11}, "comp.yaml: 'controls.0.strength': .*less than or equal to 10, found 11"),
        ({"start": 0.5, "end": 0.5}, "controls.0: start, end: expected 0 <= start < end <= 1"),
        ({"regions": [1]}, "controls.0.regions: expected 2 strengths, one a region, found 1"),
        ({"regions": [1, -1]}, "'controls.0.regions.1': .*greater than or equal to 0, found -1"),
        ({"outside": float("nan")}, "'controls.0.outside': .*found nan"),
        ({"strength_map": "map.png"}, "controls.0: expected a strength_map or regions, found both"),
        ({"regions": [], "strength_map": "none.png"}, "none.png: cannot be read"),
    ],
)
def test_refused_controls(change, message, written):
    table = TABLE | {"controls": [TABLE["controls"][0] | change]}
    with pytest.raises(MixOfShowError, match=message) as error:
        make_composition(table, "comp.yaml", written.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["nonsense", "network: [", "picture: x.png", "network: a, picture: [1]", "a: {b"])
def test_refused_options(text, written):
    with pytest.raises(MixOfShowError) as error:
        from_options(written, {"controls": [text]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (
            {"network": "emojiland-t2i-adapter", "picture": "/etc/hostname"},
            "controls.0.network_hash: expected the hash",
        ),
        (
            {"network": "emojiland-t2i-adapter", "picture": "/etc/hostname", "network_hash": "0"},
            "controls.0.picture_hash: expected the hash",
        ),
        (
            {"network": "a", "picture": "b", "network_hash": "0", "picture_hash": "0", "strength_map": "/etc/hostname"},
            "controls.0.strength_map: expected the picture itself",
        ),
    ],
)
def test_a_png_cannot_have_files_read_that_it_does_not_know(control, message):
    with pytest.raises(SettingsError, match=message):
        make_composition({"prompt": "a", "controls": [control]}, "strange.png")
