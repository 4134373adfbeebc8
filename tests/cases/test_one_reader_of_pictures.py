"""One reader of pictures, and one of masks, for all verbs: case 06, F6, F8, F39; what is said of PNGs: B29, F3, F4."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from mixofshow import MixOfShowPipeline, load_base
from mixofshow.bases.loading import GUIDANCE
from mixofshow.bases.strangers import quiet
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BadInputError, SettingsError
from mixofshow.images import MAX_PIXELS, read_grey, read_image
from mixofshow.sampling.composition import make_composition, parse_size
from mixofshow.sampling.drawing import draw_grid, draw_pictures
from mixofshow.sampling.pictures import read_picture
from mixofshow.sampling.replay import PNG_KEY, read_note, replay

RAMP = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
TURNED = 6


def files(folder):
    """Name and file of each kind of picture."""
    grey, colour = Image.fromarray((RAMP >> 8).astype(np.uint8)), Image.new("RGB", (8, 4), (200, 100, 50))
    colour.paste((0, 0, 0), (0, 0, 4, 4))
    made = {
        "deep": (Image.fromarray(RAMP), {}),
        "clear": (Image.merge("LA", [grey, grey]), {}),
        "palette": (colour.quantize(2), {}),
        "turned": (colour, {"exif": exif(TURNED)}),
        "bits": (grey.convert("1"), {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / f"{name}.png", **options)
    colour.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    return sorted(folder.iterdir())


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def test_all_verbs_read_alike(tmp_path):
    """Case 06: only tuning knew 16 bits."""
    for path in files(tmp_path):
        for mode, learned in (
            ("RGB", read_image(path, path.name, background="black").image),
            ("L", read_grey(path, "mask")),
        ):
            for source in (path, str(path)):
                found = read_picture(source, mode)
                assert (found.mode, found.tobytes()) == (mode, learned.tobytes()), (path.name, mode)
    assert read_picture(tmp_path / "turned.png", "RGB").size == (4, 8)
    expected = ((RAMP.astype(int) * 255 + 32767) // 65535).astype(np.uint8)
    for source in (tmp_path / "deep.png", Image.fromarray(RAMP), Image.fromarray(RAMP.astype(np.int32))):
        assert np.array_equal(np.array(read_picture(source, "L")), expected)
        assert np.array_equal(np.array(read_picture(source, "RGB"))[..., 0], expected)


def test_what_is_no_single_picture_is_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(BadInputError, match="an animation of 2 frames"):
        read_picture(tmp_path / "a.png", "L")
    with pytest.raises(BadInputError, match="fractions .mode F., expected whole numbers"):
        read_picture(Image.new("F", (8, 8)), "L")


def bomb(width, height):
    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 60_000])
@pytest.mark.parametrize("read", [lambda path: read_picture(path, "L"), read_note])
def test_a_bomb_is_one_line(side, read, tmp_path):
    """F6, F8: a traceback, or a warning of two lines before the error."""
    (tmp_path / "a.png").write_bytes(bomb(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadInputError, match=f"pixels, at most {MAX_PIXELS} are read"):
            read(tmp_path / "a.png")


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
@pytest.mark.parametrize(("mode", "read"), [("RGBA", "read_image"), ("I;16", "read_grey")])
def test_the_largest_picture_takes_less_than_a_gigabyte(mode, read, tmp_path):
    """F39: it took up to 1.9."""
    Image.new(mode, (10_000, 5_000)).save(tmp_path / "a.png", compress_level=1)
    code = (
        "import re, sys; from pathlib import Path; from mixofshow import images; "
        f"images.{read}(Path(sys.argv[1]), 'a'); "
        # Not getrusage: there a new program's peak begins at that of the process that started it.
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True, env=os.environ, check=True
    )
    assert int(run.stdout) < 2**20


def test_a_png_says_all_values(golden_pipeline, tmp_path, monkeypatch):
    """B29: another default, or another guidance for the base, and the replayed picture was another."""
    draw = MixOfShowPipeline.of(ConceptModel(golden_pipeline))
    wanted = make_composition({"prompt": "a castle", "steps": 2, "width": 64})
    draw_pictures(draw, wanted, [tmp_path / "a.png"])
    with Image.open(tmp_path / "a.png") as image:
        about = json.loads(image.info[PNG_KEY])["composition"]
    assert about.keys() == type(wanted).model_fields.keys()
    assert (about["guidance_scale"], about["height"], about["upscale"]) == (7.5, draw.unet.config.sample_size * 8, 1)
    monkeypatch.setitem(GUIDANCE, "pipeline", 3.0)
    replay(draw, tmp_path / "a.png", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("text", ["²x64", "x64", f"{'9' * 5000}x64", "64", "-8x8", "64x64x64"])
def test_sizes(text):
    """F3."""
    with pytest.raises(SettingsError, match="expected WIDTHxHEIGHT"):
        parse_size(text)
    assert parse_size("160X64") == (160, 64)


@pytest.mark.parametrize("vary", ["num=1,2", "seed=1,2"])
def test_a_grid_that_has_no_columns_is_refused_first(vary, tmp_path):
    """F4: it failed after all was drawn."""
    wanted = make_composition({"prompt": "a castle", "num": 2})
    with pytest.raises(SettingsError, match="seed and num cannot vary"):
        draw_grid(None, wanted, vary, tmp_path / "grid.png")


def test_loading_leaves_the_libraries_as_loud_as_they_were():
    """B39: they were silent for the rest of the program."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(one.get_verbosity(), one.is_progress_bar_enabled()) for one in libraries]
    try:
        for one in libraries:
            one.set_verbosity_info()
            one.enable_progress_bar()
        first, second = quiet(), quiet()  # as two threads that load at once
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert all(one.get_verbosity() == 40 for one in libraries)
        second.__exit__(None, None, None)
        load_base("tests/goldens/pipeline")
        assert all(one.get_verbosity() == 20 and one.is_progress_bar_enabled() for one in libraries)
    finally:
        for one, (verbosity, bars) in zip(libraries, before, strict=True):
            one.set_verbosity(verbosity)
            (one.enable_progress_bar if bars else one.disable_progress_bar)()


def test_read_image_and_read_grey_name_what_they_read():
    with pytest.raises(BadInputError, match="^the picture: not a readable picture"):
        read_image(b"no picture", "the picture")
    with pytest.raises(BadInputError, match="^the mask: not a readable picture .the file is empty"):
        read_grey(b"", "the mask")
