"""One picture: whatever the file holds, its colours come out as they are meant, or the reason why not is told."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from mixofshow.errors import DatasetError, SettingsError
from mixofshow.images import MAX_PIXELS, colour_of, label, read_grey, read_image

SIZE = (40, 36)


def read_picture(path, **options):
    """A picture, as tuning reads it."""
    return read_image(path, label(path), error=DatasetError, **options)


def read_mask(path, *, name):
    """A mask, as tuning reads it."""
    return read_grey(path, name, error=DatasetError)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(size, *, depth=8, kind=0, row=b"", rows=0, extra=b""):
    """A PNG file written by hand, so that nothing depends on what Pillow can write."""
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * rows)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _near(image, expected):
    worst = np.abs(np.asarray(image).astype(int) - np.array(expected)).max()
    return image.mode == "RGB" and worst <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_turned_upright(tmp_path, orientation):
    upright = Image.new("RGB", SIZE, "white")
    upright.paste("red", (0, 0, 8, 8))
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    picture = read_picture(tmp_path / "photo.png")
    assert picture.image.size == SIZE and picture.image.tobytes() == upright.tobytes()
    expected = () if orientation == 1 else (f"turned upright (EXIF orientation {orientation})",)
    assert picture.notes == expected
    assert read_mask(tmp_path / "photo.png", name="photo").tobytes() == upright.convert("L").tobytes()


def _palette():
    image = Image.new("P", SIZE, 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "file", "expected", "note"),
    [
        (Image.new("RGB", SIZE, (10, 200, 30)), "a.png", (10, 200, 30), None),
        (Image.new("L", SIZE, 77), "a.png", (77, 77, 77), None),
        (Image.new("1", SIZE, 1), "a.png", (255, 255, 255), None),
        (Image.new("RGBA", SIZE, (10, 200, 30, 255)), "a.png", (10, 200, 30), None),
        (Image.new("RGBA", SIZE, (255, 0, 0, 0)), "a.png", (255, 255, 255), "transparency is filled with white"),
        (Image.new("RGBA", SIZE, (255, 0, 0, 51)), "a.png", (255, 204, 204), "transparency is filled with white"),
        (Image.new("RGBA", SIZE, (0, 0, 0, 128)), "a.webp", (127, 127, 127), "transparency is filled with white"),
        (Image.new("LA", SIZE, (0, 51)), "a.png", (204, 204, 204), "transparency is filled with white"),
        (_palette(), "a.png", (0, 0, 255), None),
        (Image.new("CMYK", SIZE, (0, 255, 255, 0)), "a.jpg", (255, 0, 0), "CMYK is turned into RGB"),
        (Image.new("I;16", SIZE, 40000), "a.png", (156, 156, 156), "16 bits per channel are scaled to 8"),
        (Image.new("I;16", SIZE, 65535), "a.png", (255, 255, 255), "16 bits per channel are scaled to 8"),
    ],
    ids=["rgb", "grey", "bit", "opaque", "clear", "part", "webp", "grey-alpha", "palette", "cmyk", "16", "16-white"],
)
def test_colours_are_those_that_were_meant(tmp_path, image, file, expected, note):
    image.save(tmp_path / file, **({"lossless": True} if file.endswith("webp") else {}))
    picture = read_picture(tmp_path / file)
    assert picture.image.size == SIZE and _near(picture.image, expected)
    assert picture.mask is None
    assert picture.notes == ((note,) if note else ())


@pytest.mark.parametrize(
    ("kind", "pixel", "clear", "expected"),
    [
        (0, (40000,), None, (156, 156, 156)),
        (0, (40000,), (40000,), (0, 0, 255)),
        (2, (40000, 20000, 300), None, (156, 78, 1)),
        (2, (40000, 20000, 300), (40000, 20000, 300), (0, 0, 255)),
        (4, (40000, 0), None, (0, 0, 255)),
        (6, (40000, 20000, 300, 0), None, (0, 0, 255)),
    ],
)
def test_16_bits_of_every_kind_are_scaled_with_their_transparency(tmp_path, kind, pixel, clear, expected):
    row = struct.pack(f">{len(pixel)}H", *pixel) * 40
    extra = _chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    (tmp_path / "a.png").write_bytes(_png((40, 40), depth=16, kind=kind, row=row, rows=40, extra=extra))
    picture = read_picture(tmp_path / "a.png", background="blue")
    assert _near(picture.image, expected)
    assert "16 bits per channel are scaled to 8" in picture.notes


def test_transparency_becomes_the_mask_if_asked_to(tmp_path):
    image = Image.new("RGBA", SIZE, (200, 0, 0, 255))
    image.paste((0, 200, 0, 0), (0, 0, 10, 10))
    image.save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png", alpha="mask", background="#0000ff")
    assert picture.mask.mode == "L" and picture.mask.tobytes() == image.getchannel("A").tobytes()
    assert picture.image.getpixel((0, 0)) == (0, 0, 255) and picture.image.getpixel((39, 35)) == (200, 0, 0)
    Image.new("RGB", SIZE).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png", alpha="mask").mask is None


def _gamma_one_profile():
    """An RGB profile with sRGB's primaries and no gamma: half the light is 128 in it, and 188 in sRGB."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    for place in range(132, 132 + 12 * count, 12):
        tag, offset, length = struct.unpack(">4sII", data[place : place + 12])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            data[offset : offset + length] = (b"curv" + bytes(8)).ljust(length, b"\0")
        if tag == b"desc":
            data[offset : offset + length] = bytes(data[offset : offset + length]).replace(
                "s".encode("utf-16-be"), b"\0L"
            )
    return bytes(data)


def test_a_colour_profile_is_turned_into_srgb(tmp_path):
    linear = Image.new("RGB", SIZE, (128, 0, 255))
    linear.save(tmp_path / "a.png", icc_profile=_gamma_one_profile())
    picture = read_picture(tmp_path / "a.png")
    # IEC 61966-2-1: 1.055 · (128/255)^(1/2.4) - 0.055 = 0.7368
    assert _near(picture.image, (188, 0, 255))
    assert [note for note in picture.notes if note.endswith("to sRGB")] == list(picture.notes) != []
    assert read_mask(tmp_path / "a.png", name="a").tobytes() == linear.convert("L").tobytes()


def test_an_srgb_profile_changes_nothing_and_a_broken_one_is_noted(tmp_path):
    image = Image.new("RGB", SIZE, (128, 3, 255))
    image.save(tmp_path / "good.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    image.save(tmp_path / "bad.png", icc_profile=b"junk")
    good, bad = read_picture(tmp_path / "good.png"), read_picture(tmp_path / "bad.png")
    assert good.image.tobytes() == bad.image.tobytes() == image.tobytes()
    assert good.notes == () and "its colour profile cannot be used" in bad.notes[0]


def test_a_profile_of_another_colour_space_is_not_used(tmp_path):
    image = Image.new("CMYK", SIZE, (0, 255, 255, 0))
    image.save(tmp_path / "a.jpg", icc_profile=_gamma_one_profile())
    picture = read_picture(tmp_path / "a.jpg")
    assert _near(picture.image, (255, 0, 0)) and "it is for RGB and the picture is CMYK" in picture.notes[1]


def test_the_photograph_of_a_telephone_s_jpeg_with_more_behind_it_is_used(tmp_path):
    behind = [Image.new("RGB", (8, 8), "blue")]
    Image.new("RGB", SIZE, "red").save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=behind)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.image.size == SIZE and _near(picture.image, (254, 0, 0))
    assert picture.notes == ("the first of the 2 pictures in it is used",)


def test_a_mask_is_black_where_it_is_transparent(tmp_path):
    mask = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 8))
    mask.save(tmp_path / "a.png")
    read = read_mask(tmp_path / "a.png", name="a")
    assert read.mode == "L" and read.getpixel((0, 0)) == 255 and read.getpixel((20, 20)) == 0
    Image.new("I;16", SIZE, 40000).save(tmp_path / "b.png")
    assert abs(read_mask(tmp_path / "b.png", name="b").getpixel((0, 0)) - 156) <= 1


def _cut(path, image, **options):
    image.save(path, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8))


def _broken(path, kind):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    if kind.startswith("cut"):
        _cut(path, _noise())
    elif kind == "checksum":
        data = bytearray(_png((40, 40), row=bytes(40), rows=40))
        data[-20] ^= 255
        path.write_bytes(data)
    elif kind == "animation":
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "tiff":
        frames[0].save(path, "TIFF")
    else:
        path.write_bytes(
            {
                "zero bytes": b"",
                "text": b"no picture",
                "svg": b"<svg/>",
                "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                "bomb": _png((10_000, 10_000), row=bytes(10), rows=1),
                "larger bomb": _png((14_000, 14_000), row=bytes(10), rows=1),
                "text bomb": _png(
                    (40, 40),
                    row=bytes(40),
                    rows=40,
                    extra=_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10_000_000))),
                ),
            }[kind]
        )


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("zero bytes", "a.png", r"not a readable picture \(the file is empty\)"),
        ("text", "a.png", r"not a readable picture \(neither PNG, JPEG nor WEBP\)"),
        ("svg", "a.png", "not a readable picture"),
        ("eps", "a.jpg", "not a readable picture"),
        ("tiff", "a.png", "not a readable picture"),
        ("cut", "a.png", "not a readable picture"),
        ("cut", "a.jpg", "not a readable picture"),
        ("cut", "a.webp", "not a readable picture"),
        ("checksum", "a.png", "not a readable picture"),
        ("bomb", "a.png", f"10000 x 10000 pixels, at most {MAX_PIXELS} are read"),
        ("larger bomb", "a.png", f"too many pixels, at most {MAX_PIXELS} are read"),
        ("text bomb", "a.png", "not a readable picture"),
        ("animation", "a.webp", "an animation of 2 frames"),
        ("animation", "a.png", "an animation of 2 frames"),
    ],
)
def test_bad_files_are_refused_by_name_and_stay_as_they_are(tmp_path, kind, file, message):
    _broken(tmp_path / file, kind)
    before = (tmp_path / file).read_bytes()
    with pytest.raises(DatasetError, match=f"^{file}: {message}"):
        read_picture(tmp_path / file)
    with pytest.raises(DatasetError, match=f"^masks/x: {message}"):
        read_mask(tmp_path / file, name="masks/x")
    assert (tmp_path / file).read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [file]


def test_a_folder_that_is_called_like_a_picture_is_refused(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DatasetError, match="^a.png: not a file"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(1, 1), (60_000, 1), (31, 500)])
def test_small_pictures_are_used_with_a_note(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert picture.image.size == size
    assert picture.notes == (f"only {size[0]} x {size[1]} pixels: it will be enlarged",)


def test_what_cannot_be_printed_is_escaped_in_messages(tmp_path):
    path = tmp_path / "ü\x1b[31m.png"
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"^ü\\x1b\[31m.png: not a"):
        read_picture(path)


@pytest.mark.parametrize(
    ("name", "expected"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("#10203040", (16, 32, 48))]
)
def test_colours_have_names(name, expected):
    assert colour_of(name) == expected


@pytest.mark.parametrize("name", ["whit", "", "#12", "rgb(1,2)"])
def test_an_unknown_colour_is_refused(name):
    with pytest.raises(SettingsError, match="'pictures.background': expected a colour's name or #rrggbb"):
        colour_of(name)
