"""What is there and not used is said, and so is what is used from elsewhere: cases 07, 08, 24, settings without effect."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from PIL import Image

from mixofshow import make_settings, tune
from mixofshow.cli.options import _help
from mixofshow.errors import DatasetError
from mixofshow.sampling.drawing import open_pipeline
from mixofshow.tuning.captions import Naming
from mixofshow.tuning.check import check_folder
from mixofshow.tuning.conflicts import idle
from mixofshow.tuning.dataset import read_folder, readings
from mixofshow.tuning.settings import TuningSettings, dotted_keys

GOLDEN_BASE = str(Path(__file__).parents[1] / "goldens" / "pipeline")
PROMPT = "a photo of a <mydog>"
NAMING = Naming("<mydog>", ("<mydog1>", "<mydog2>"), "dog")


@pytest.fixture
def folder(tmp_path):
    """Two pictures, in a folder that has another beside it."""
    (tmp_path / "data" / "mydog").mkdir(parents=True)
    for number, colour in enumerate(("red", "blue"), 1):
        Image.new("RGB", (40, 36), colour).save(tmp_path / "data" / "mydog" / f"0{number}.png")
    return tmp_path / "data" / "mydog"


def _captions(folder, **options):
    return [example.caption for example in read_folder(folder, instance_prompt=PROMPT, **options)]


def _findings(folder):
    return [str(one) for reading in readings(folder, instance_prompt=PROMPT) for one in reading.findings]


def test_a_strength_without_concepts_is_said(caplog):
    """Of diffusers' img2img, that is how far to go from a picture."""
    open_pipeline(GOLDEN_BASE, strength=0.5)
    assert "`strength` changes nothing without concepts; how far to go from a picture is `image_strength`" in caplog.text


def test_a_base_beside_a_whole_model_is_said(caplog):
    open_pipeline(GOLDEN_BASE, base="emojiland")
    assert "`base` changes nothing: " in caplog.text and "is a whole model, and no delta file" in caplog.text


@pytest.mark.parametrize("name", ["01.txt", "01.caption", "01.TXT"])
def test_captions_of_kohyas_scripts_are_read(folder, name):
    (folder / name).write_text("a <mydog> in the snow")
    assert _captions(folder) == ["a <mydog> in the snow", PROMPT]
    assert not _findings(folder)


def test_captions_in_a_table_are_read(folder):
    (folder / "metadata.csv").write_text('file_name,text\n02.png,"a <mydog>, in the snow"\n')
    assert _captions(folder) == [PROMPT, "a <mydog>, in the snow"]
    (folder / "metadata.csv").write_text("file_name,caption\n02.png,a\n")
    with pytest.raises(
        DatasetError, match="metadata.csv: line 2: expected a text 'text', found only file_name, caption"
    ):
        _captions(folder)


UNUSED = {
    "1.txt": "not read: it belongs to no picture; did you mean '01'?",
    "02.png.txt": "not read: it belongs to no picture; call it 02.txt",
    "captions.json": "not read: captions are those of .txt and .caption files, metadata.jsonl and metadata.csv",
    "02.caption": "not read: 02.txt is the caption of 02.png",
    "03-masklabel.png": "not used: the mask of no picture; did you mean '02'?",
    "02_mask.png": "used as a picture, though it looks like a mask; that would be 02-masklabel.png",
    "10_dog/": "not read: a folder with pictures",
}


@pytest.mark.parametrize("name", UNUSED)
def test_what_belongs_to_no_picture_is_said(folder, name, caplog):
    (folder / "02.txt").write_text("a <mydog>")
    if name.endswith("/"):
        (folder / name).mkdir()
        Image.new("RGB", (40, 36)).save(folder / name / "x.png")
    elif name.endswith(".png"):
        Image.new("L", (40, 36)).save(folder / name)
    else:
        (folder / name).write_text("a <mydog> in the snow")
    assert _findings(folder) == [f"{name}: {UNUSED[name]}"]
    read_folder(folder, instance_prompt=PROMPT)
    assert UNUSED[name] in caplog.text


def test_pictures_one_folder_deeper_are_pointed_out(folder):
    with pytest.raises(DatasetError, match="data: no pictures in it; expected .*; there are some in mydog"):
        read_folder(folder.parent, instance_prompt=PROMPT)


def _masks(place, *names):
    place.mkdir(exist_ok=True)
    for name in names:
        Image.new("L", (40, 36), 255).save(place / name)


def test_masks_from_outside_are_counted(folder, caplog):
    _masks(folder.parent / "masks", "01.png", "02.png", "11.png")
    read_folder(folder, instance_prompt=PROMPT)
    assert "masks/: 1 masks belong to no picture: 11.png" in caplog.text
    assert "masks/: 2 of 2 pictures have masks, of the folder beside theirs; `masks` names another" in caplog.text


def test_a_folder_of_masks_of_other_pictures_alone_is_not_used(folder, caplog):
    _masks(folder.parent / "masks", "cat.png")
    assert [one.mask for one in read_folder(folder, instance_prompt=PROMPT)] == [None, None]
    assert "masks/: not used: it has a mask of none of the pictures" in caplog.text


def test_masks_as_onetrainer_keeps_them_are_masks(folder):
    _masks(folder, "01-masklabel.png")
    examples = read_folder(folder, instance_prompt=PROMPT)
    assert [(one.name, one.mask is not None) for one in examples] == [("01.png", True), ("02.png", False)]
    assert _findings(folder) == ["*-masklabel: 1 of 2 pictures have masks, which lie beside them"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of a <mydog>", "a photo of a <mydog>"),
        ("a photo of a <MyDog>", "a photo of a <MyDog>"),
        ("a <mydog1> <mydog2> here", "a <mydog1> <mydog2> here"),
        ("a dog on a mat", "a <mydog> on a mat"),
        ("Dog running after a dog", "<mydog> running after a dog"),
        ("hotdogs and a DOG", "hotdogs and a <mydog>"),
    ],
)
def test_case_does_not_matter_in_captions(caption, expected):
    assert NAMING.named(caption) == expected


def test_a_class_word_has_several_spellings():
    bear = Naming("<bear>", (), "teddy bear", "plush, Teddybear")
    for caption in ("a Teddy Bear", "a teddy_bear", "a teddy-bear", "a teddybear", "a Plush"):
        assert bear.named(caption) == "a <bear>"


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (
            "1dog, solo, snow",
            "names neither <mydog> nor its class word 'dog'; '1dog' counts with `captions.synonyms` 1dog",
        ),
        ("a cat", "names neither <mydog> nor its class word 'dog'; write one of them into it"),
        ("a <cat> and a dog", "names <cat>, which is no word of <mydog>"),
    ],
)
def test_a_caption_about_something_else_is_refused(caption, message):
    with pytest.raises(DatasetError, match=message):
        NAMING.named(caption)


def test_all_captions_that_name_nothing_are_listed_with_their_files(folder):
    (folder / "01.txt").write_text("two dogs in the snow")
    (folder / "02.txt").write_text("a cat")
    with pytest.raises(DatasetError, match="^01.txt: caption 'two dogs .*; 02.txt: caption 'a cat' names neither"):
        _captions(folder, naming=NAMING)
    assert [(one.file, one.level) for one in check_folder(folder, naming=NAMING)] == [
        ("01.txt", "error"),
        ("02.txt", "error"),
    ]
    (hint,) = check_folder(folder)
    assert str(hint).startswith("captions: no <name> in 2 of them, such as 'two dogs in the snow'")
    (folder / "02.txt").write_text("a dog")
    assert _captions(folder, naming=NAMING, skip_bad=True) == ["a dog"]


WITHOUT_EFFECT = {
    "unet.rank": {"method": "p-plus", "unet.rank": 8},
    "text_encoder.rate": {"method": "custom-diffusion", "text_encoder.rate": 0.5},
    "words.sigma": {"method": "textual-inversion", "words.sigma": 0.5},
    "captions.keep": {"captions.keep": 3},
    "captions.shuffle": {"captions.shuffle": True, "captions.templates": "object"},
    "instance_prompt": {"instance_prompt": "a <mydog>", "captions.templates": "object"},
    "loss.full_identity": {"loss.full_identity": False},
    "pictures.crops": {"pictures.crops": 4, "pictures.fit": "pad"},
    "prior.count": {"prior.count": 3},
    "steps": {"steps": 5, "epochs": 2},
}


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_settings_that_do_nothing_are_said(key):
    table = {"name": "mydog", "class_word": "dog", "data": "x"}
    (line,) = idle(make_settings({**table, **WITHOUT_EFFECT[key]}))
    assert line.startswith(f"{key} does nothing: ")
    assert not idle(make_settings({**table, "unet.rank": 8, "text_encoder.rate": 0.5, "words.sigma": 0.5, "steps": 5}))


def test_the_run_says_them(golden_pipeline, folder, caplog):
    keys = {"steps": 1, "batch_size": 1, "pictures.size": 64, "prior.count": 3, "loss.attention_weight": 0.1}
    tune(golden_pipeline, folder, name="mydog", class_word="man", **keys)
    assert "prior.count does nothing: prior.weight is 0" in caplog.text
    assert "loss.attention_weight does nothing: no picture has a mask" in caplog.text


def test_the_help_of_tune_says_what_each_setting_is_and_takes():
    for key, field in dotted_keys(TuningSettings):
        said = _help(field)
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        assert len(said) > 10 and all(str(choice) in said for choice in choices), key
    assert "One of fp32, bf16, fp16. Default: fp32." in _help(TuningSettings.model_fields["precision"])
