"""Folders of pictures and captions: what is read, how, and what is refused by name."""

from __future__ import annotations

import pytest
from PIL import Image

from mixofshow.errors import DatasetError
from mixofshow.tuning.dataset import as_tensor, read_folder, read_picture, with_placeholder

PROMPT = "a photo of a <cat>"


def _save(path, colour="red", size=(20, 10), **options):
    Image.new("RGB", size, colour).save(path, **options)
    return path


def test_pictures_come_in_natural_order_with_their_captions(tmp_path):
    for number in (10, 2, 1):
        _save(tmp_path / f"{number}.png")
    (tmp_path / "2.txt").write_text("\ufeffa  cat\non the beach ", encoding="utf-8")
    (tmp_path / "10.txt").write_text("")
    (tmp_path / "notes.md").write_text("not a picture")
    examples = read_folder(tmp_path, instance_prompt=PROMPT)
    assert [(example.name, example.caption) for example in examples] == [
        ("1.png", PROMPT),
        ("2.png", "a cat on the beach"),
        ("10.png", PROMPT),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable picture"),
        (b"<svg/>", "not a readable picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a readable picture"),
    ],
)
def test_a_bad_picture_is_named_and_can_be_left_out(tmp_path, content, message):
    (tmp_path / "bad.png").write_bytes(content)
    _save(tmp_path / "good.png")
    with pytest.raises(DatasetError, match=f"bad.png: {message}"):
        read_folder(tmp_path, instance_prompt=PROMPT)
    assert [one.name for one in read_folder(tmp_path, instance_prompt=PROMPT, skip_bad=True)] == ["good.png"]
    assert (tmp_path / "bad.png").read_bytes() == content


def test_a_picture_cut_in_half_is_refused(tmp_path):
    path = _save(tmp_path / "cut.png", size=(200, 200))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match="cut.png"):
        read_picture(path)


def test_an_animation_is_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(DatasetError, match="animation of 2 frames"):
        read_picture(tmp_path / "moving.webp")


@pytest.mark.parametrize("folder", ["missing", "empty", "all_bad"])
def test_a_folder_without_pictures_is_refused(tmp_path, folder):
    if folder != "missing":
        (tmp_path / folder).mkdir()
    if folder == "all_bad":
        (tmp_path / folder / "bad.jpg").write_bytes(b"no")
    with pytest.raises(DatasetError):
        read_folder(tmp_path / folder, instance_prompt=PROMPT, skip_bad=True)


def test_a_caption_that_is_not_utf8_is_named_with_its_byte(tmp_path):
    _save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Katze süß".encode("latin-1"))
    with pytest.raises(DatasetError, match="a.txt: not UTF-8 at byte 7"):
        read_folder(tmp_path, instance_prompt=PROMPT)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_turned_upright(tmp_path, orientation):
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 8, 8))
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert read_picture(tmp_path / "photo.png").tobytes() == upright.tobytes()


def test_what_is_transparent_becomes_white_and_16_bits_are_scaled(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("I;16", (4, 4), 40000).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert abs(read_picture(tmp_path / "deep.png").getpixel((0, 0))[0] - 40000 * 255 / 65535) <= 2


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of a <cat>", "a photo of a <cat>"),
        ("a <cat1> <cat2> here", "a <cat1> <cat2> here"),
        ("a cat on a mat", "a <cat> on a mat"),
        ("concatenate a cat", "concatenate a <cat>"),
    ],
)
def test_captions_name_the_concept(caption, expected):
    assert with_placeholder(caption, "<cat>", ("<cat1>", "<cat2>"), "cat") == expected


def test_a_caption_about_something_else_is_refused():
    with pytest.raises(DatasetError, match="names neither <cat> nor its class word 'cat'"):
        with_placeholder("a dog", "<cat>", ("<cat1>", "<cat2>"), "cat")


def test_tensors_are_scaled_and_cut_around_the_middle():
    picture = Image.new("RGB", (30, 10), "black")
    picture.paste("white", (10, 0, 20, 10))
    tensor = as_tensor([picture], width=10, height=10)
    assert tensor.shape == (1, 3, 10, 10) and tensor.min() > 0.9
