"""Folders of pictures, captions and masks: what is read, how, and what is refused by name."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from mixofshow.errors import DatasetError, SettingsError
from mixofshow.tuning.dataset import read_folder

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


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "data" / "pictures"
    folder.mkdir(parents=True)
    return folder


def _mask(folder, name, size=(20, 10), box=(0, 0, 5, 5)):
    folder.mkdir(exist_ok=True)
    image = Image.new("L", size, 0)
    image.paste(255, box)
    image.save(folder / name)
    return image


def _bytes_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_captions_come_from_metadata_lines(pictures):
    for name in ("1.png", "2.png", "3.png"):
        _save(pictures / name)
    lines = [{"file_name": "2.png", "text": "two\u2028  lines", "more": 1}, {"file_name": "./1.png", "text": "one"}]
    text = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (pictures / "metadata.jsonl").write_text(text, encoding="utf-8")
    captions = [example.caption for example in read_folder(pictures, instance_prompt=PROMPT)]
    assert captions == ["one", "two lines", PROMPT]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "expected {"),
        (b'{"file_name": "1.png"}', "expected a text 'text', found only file_name"),
        (b'{"file_name": 1, "text": "a"}', "expected a text 'file_name', found 1"),
        (b'{"file_name": "../1.png", "text": "a"}', "leaves the folder"),
        (b'{"file_name": "/1.png", "text": "a"}', "leaves the folder"),
        (b'{"file_name": "..\\\\1.png", "text": "a"}', "leaves the folder"),
        (b'{"file_name": "C:\\\\1.png", "text": "a"}', "leaves the folder"),
        (b'{"file_name": "11.png", "text": "a"}', "no picture '11.png' in the folder; did you mean '1.png'?"),
        (b'{"file_name": "1.png", "text": "second"}', "a second caption of 1.png"),
        (b'{"file_name": "1.png", "text": "\xff"}', "not UTF-8 at its byte 32"),
        (b'{"file_name": "2.png", "text": "' + b"x" * 10_001 + b'"}', "at most 10000 bytes"),
    ],
)
def test_a_bad_line_of_metadata_is_named_and_cannot_be_left_out(pictures, line, message):
    for name in ("1.png", "2.png"):
        _save(pictures / name)
    good = b'{"file_name": "1.png", "text": "first"}'
    (pictures / "metadata.jsonl").write_bytes(good + b"\n" + line + b"\n")
    for skip_bad in (False, True):
        with pytest.raises(DatasetError) as raised:
            read_folder(pictures, instance_prompt=PROMPT, skip_bad=skip_bad)
        assert str(raised.value).startswith("metadata.jsonl: line 2: ") and message in str(raised.value)
        assert "skip_bad" not in str(raised.value)


def test_a_caption_in_both_places_is_refused(pictures):
    _save(pictures / "1.png")
    (pictures / "1.txt").write_text("here")
    (pictures / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "there"}')
    with pytest.raises(DatasetError, match="1.txt: metadata has a caption of this picture too"):
        read_folder(pictures, instance_prompt=PROMPT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("eine Katze".encode("utf-16"), "not UTF-8 at byte 0, it looks like UTF-16"),
        ("eine Katze".encode("utf-16-le"), "not UTF-8 at byte 0, it looks like UTF-16"),
        ("红猫".encode("gbk"), "not UTF-8 at byte 0"),
        (b"x" * 100_000, "a caption of 100000 bytes, at most 10000"),
    ],
)
def test_a_caption_in_another_encoding_or_too_long_is_refused(pictures, content, message):
    _save(pictures / "1.png")
    (pictures / "1.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=f"^1.txt: {message}"):
        read_folder(pictures, instance_prompt=PROMPT)


def test_an_empty_caption_is_the_instance_prompt_with_a_warning_and_nul_is_a_space(pictures, caplog):
    for name in ("1.png", "2.png"):
        _save(pictures / name, colour="red" if name == "1.png" else "blue")
    (pictures / "1.txt").write_text("\ufeff \n", encoding="utf-8")
    (pictures / "2.txt").write_bytes(b"a\0long enough cat")
    captions = [example.caption for example in read_folder(pictures, instance_prompt=PROMPT)]
    assert captions == [PROMPT, "a long enough cat"]
    assert [record.getMessage() for record in caplog.records] == [
        f"1.txt: the caption of 1.png is empty; '{PROMPT}' is used"
    ]


@pytest.mark.parametrize("where", ["beside", "given"])
def test_masks_are_found_by_stem(pictures, tmp_path, where):
    _save(pictures / "1.JPG", format="JPEG")
    _save(pictures / "10.png")
    folder = pictures.parent / "masks" if where == "beside" else tmp_path / "elsewhere"
    expected = [_mask(folder, "1.png"), _mask(folder, "10.webp", box=(9, 3, 20, 10))]
    examples = read_folder(pictures, instance_prompt=PROMPT, masks=None if where == "beside" else folder)
    assert [example.mask.mode for example in examples] == ["L", "L"]
    assert examples[0].mask.tobytes() == expected[0].tobytes()
    assert np.abs(np.asarray(examples[1].mask, int) - np.asarray(expected[1], int)).mean() < 10  # WebP loses some
    without = read_folder(pictures, instance_prompt=PROMPT, with_masks=False)
    assert [example.mask for example in without] == [None, None]


def test_the_folder_beside_is_found_from_inside_and_is_not_its_own(pictures, monkeypatch):
    _save(pictures / "1.png")
    mask = _mask(pictures.parent / "masks", "1.png", box=(3, 3, 9, 9))
    monkeypatch.chdir(pictures)
    assert read_folder(type(pictures)("."), instance_prompt=PROMPT)[0].mask.tobytes() == mask.tobytes()
    assert read_folder(pictures.parent / "masks", instance_prompt=PROMPT)[0].mask is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_and_mask_are_each_turned_by_their_own_exif(pictures, orientation):
    upright = Image.new("L", (24, 16), 0)
    upright.paste(255, (0, 0, 8, 8))
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (pictures.parent / "masks").mkdir()
    stored.convert("RGB").save(pictures / "turned.png", exif=exif)
    upright.save(pictures.parent / "masks" / "turned.png")
    upright.convert("RGB").save(pictures / "upright.png")
    stored.save(pictures.parent / "masks" / "upright.png", exif=exif)
    for example in read_folder(pictures, instance_prompt=PROMPT):
        assert example.image.getchannel("R").tobytes() == upright.tobytes() == example.mask.tobytes()
        assert example.image.size == example.mask.size == (24, 16)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, r"2.png: no mask in .*masks; expected 2.png"),
        ({"2.png": (10, 20)}, "2.png: its mask has 10 x 20 pixels, the picture has 20 x 10; save"),
        ({"2.png": (20, 10), "2.jpg": (20, 10)}, "2.png: 2.jpg and 2.png in .*; keep one of them"),
        ({"2.png": None}, "2.png: its mask masks/2.png: not a readable picture"),
    ],
)
def test_a_mask_that_is_missing_or_does_not_fit_is_named(pictures, masks, message):
    folder = pictures.parent / "masks"
    for name in ("1.png", "2.png"):
        _save(pictures / name)
    _mask(folder, "1.png")
    for name, size in masks.items():
        if size:
            _mask(folder, name, size)
        else:
            (folder / name).write_bytes(b"no")
    before = _bytes_of(pictures.parent)
    with pytest.raises(DatasetError, match=message):
        read_folder(pictures, instance_prompt=PROMPT)
    assert [one.name for one in read_folder(pictures, instance_prompt=PROMPT, skip_bad=True)] == ["1.png"]
    assert _bytes_of(pictures.parent) == before


def test_a_folder_of_masks_that_is_not_there_is_refused(pictures, tmp_path):
    _save(pictures / "1.png")
    with pytest.raises(DatasetError, match="nowhere: no such folder of masks"):
        read_folder(pictures, instance_prompt=PROMPT, masks=tmp_path / "nowhere")


@pytest.mark.parametrize(("value", "warned"), [(0, True), (1, True), (255, False)])
def test_a_black_mask_is_used_with_a_warning(pictures, caplog, value, warned):
    _save(pictures / "1.png")
    (pictures.parent / "masks").mkdir()
    Image.new("L", (20, 10), value).save(pictures.parent / "masks" / "1.png")
    assert read_folder(pictures, instance_prompt=PROMPT)[0].mask.getextrema() == (value, value)
    assert ("its mask is all black" in caplog.text) == warned


def test_a_mask_file_comes_before_transparency_which_comes_before_none(pictures):
    for name, opacity in (("1.png", 0), ("2.png", 0)):
        image = Image.new("RGBA", (20, 10), "red")
        image.paste((0, 0, 255, opacity), (0, 0, 10, 10))
        image.save(pictures / name)
    mask = _mask(pictures.parent / "masks", "1.png")
    first, second = read_folder(pictures, instance_prompt=PROMPT, alpha="mask", background="lime")
    assert first.mask.tobytes() == mask.tobytes()
    assert second.mask.getpixel((0, 0)) == 0 and second.mask.getpixel((19, 9)) == 255
    assert second.image.getpixel((0, 0)) == (0, 255, 0)


def test_duplicates_are_used_and_warned_of_once(pictures, caplog):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8))
    for name in ("1.png", "2.webp", "3.png"):
        noise.save(pictures / name, lossless=True)
    _save(pictures / "4.png")
    assert len(read_folder(pictures, instance_prompt=PROMPT)) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "2.webp: the same picture as 1.png; it counts twice; 3.png: the same picture as 1.png; it counts twice"
    ]


def test_what_is_left_out_is_counted(tmp_path, caplog):
    for number in range(12):
        (tmp_path / f"bad{number}.png").write_bytes(b"")
    _save(tmp_path / "good.png")
    _save(tmp_path / "other.gif")
    read_folder(tmp_path, instance_prompt=PROMPT, skip_bad=True)
    message, other = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert other.startswith("other.gif: not read")
    assert message.startswith("1 of 13 pictures are used; left out: bad0.png: ")
    assert message.endswith("and 9 more; `mixofshow check` lists them")


def test_the_digest_tells_examples_apart_by_pixels_mask_and_caption(pictures):
    def digest(colour="red", caption="a", mask=None):
        _save(pictures / "1.png", colour)
        (pictures / "1.txt").write_text(caption)
        if mask:
            _mask(pictures.parent / "masks", "1.png", box=mask)
        return read_folder(pictures, instance_prompt=PROMPT, with_masks=bool(mask))[0].digest

    assert digest() == digest() and len(digest()) == 64
    different = [
        digest(),
        digest(colour="blue"),
        digest(caption="b"),
        digest(mask=(0, 0, 2, 2)),
        digest(mask=(0, 0, 3, 3)),
    ]
    assert len(set(different)) == 5


def test_hidden_files_are_passed_over_and_other_kinds_are_mentioned(pictures, caplog):
    _save(pictures / "1.PNG")
    (pictures / "._1.png").write_bytes(b"resource fork")
    (pictures / ".DS_Store").write_bytes(b"")
    _save(pictures / "moving.gif")
    assert [one.name for one in read_folder(pictures, instance_prompt=PROMPT)] == ["1.PNG"]
    assert caplog.messages == ["moving.gif: not read; expected .png, .jpg, .jpeg, .webp"]


def test_an_unknown_background_is_refused_before_anything_is_read(pictures):
    (pictures / "1.png").write_bytes(b"bad")
    with pytest.raises(SettingsError, match="'pictures.background': .* found 'whit'; did you mean 'white'?"):
        read_folder(pictures, instance_prompt=PROMPT, background="whit")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_do_not_stop_everything(pictures):
    _save(pictures / "1.png")
    for name in ("1.txt", "2.png"):
        os.mkfifo(pictures / name)
    with pytest.raises(DatasetError, match="1.txt: not a file; 2.png: not a file"):
        read_folder(pictures, instance_prompt=PROMPT)
