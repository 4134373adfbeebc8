"""What only some random steps meet, and what can never work, is found before the first: cases 10 and 17."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mixofshow import cli, fuse, make_settings, tune
from mixofshow.errors import DatasetError, SettingsError
from mixofshow.tuning.captions import varied, whole_in_any_order
from mixofshow.tuning.conflicts import refuse_impossible, slow_precision
from mixofshow.tuning.settings import CaptionSettings
from tests.conftest import pictures_in

TABLE = {"name": "mydog", "class_word": "dog", "data": "x"}
WINDOW = 40


def _fits(text):
    """As a text encoder that reads so many letters."""
    return all(place + len("<mydog>") <= WINDOW for place in range(len(text)) if text.startswith("<mydog>", place))


@pytest.mark.parametrize(
    "caption",
    ["a, <mydog>, snow", "1dog, <mydog>, snow, solo, tree, grass, sky, sun", "a, b, c" + 9 * ", d" + ", a <mydog>"],
)
@pytest.mark.parametrize("keep", [0, 1])
def test_no_order_cuts_the_concepts_words(caption, keep):
    text, kept = whole_in_any_order(caption, {"<mydog>"}, keep, _fits)
    settings = CaptionSettings(shuffle=True, keep=keep)
    orders = {varied(text, "<mydog>", settings, torch.Generator().manual_seed(seed), kept) for seed in range(50)}
    assert all(_fits(one) and sorted(one.split(", ")) == sorted(caption.split(", ")) for one in orders)
    assert len(orders) > 1 or caption.count(",") == 2
    assert (text, kept) == (caption, keep) or len(caption) > WINDOW  # short ones are shuffled as ever


@pytest.fixture
def data(tmp_path):
    return pictures_in(tmp_path / "tags", "red", "blue")


def test_long_tags_are_shuffled_to_the_end_and_said_once(golden_pipeline, data, caplog):
    """Case 10: the run died at a step that the seed decided, after a line for nearly every step."""
    for number in range(2):
        (data / f"{number}.txt").write_text("one man, <mydog>" + 40 * ", snow")
    keys = {"steps": 6, "batch_size": 1, "captions.shuffle": True, "method": "textual-inversion"}
    with caplog.at_level(logging.WARNING):
        tune(golden_pipeline, data, name="mydog", class_word="man", **keys)
    assert [one for one in caplog.messages if "cut" in one or "longer" in one] == [
        "2 of 2: caption is longer than the text encoder's 77 tokens: its end is not read (0.png; 1.png)"
    ]


def test_a_caption_that_has_the_word_too_late_is_named_before_anything_else(golden_pipeline, data, monkeypatch):
    (data / "1.txt").write_text("snow " * 90 + "<mydog>")
    monkeypatch.setattr(golden_pipeline.vae, "encode", None)
    with pytest.raises(
        DatasetError, match="^1.png: its caption: the prompt is longer than the text encoder's 77 tokens"
    ):
        tune(golden_pipeline, data, name="mydog", class_word="man", steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "precision fp16: needs a GPU, this run is on the CPU; take bf16 or fp32"),
        ({"tracker": "wandb"}, "tracker wandb is not installed: pip install wandb"),
        ({"optimizer.name": "adamw8bit"}, "optimizer adamw8bit is not installed: pip install bitsandbytes"),
        ({"pictures.background": "whit"}, "'pictures.background': .* did you mean 'white'"),
        (dict.fromkeys(("words.rate", "unet.rate", "text_encoder.rate"), 0), "all are 0, so nothing is trained"),
        ({"method": "p-plus", "words.rate": 0}, "all are 0, so nothing is trained; raise one"),
        ({"captions.dropout": 1}, "captions.dropout 1: no caption is ever shown, so no word is learned"),
        ({"class_word": "<dog>"}, "class_word '<dog>': an ordinary word .* give 'dog'"),
    ],
)
def test_what_can_never_work_here_is_refused_before_anything_is_loaded(change, message, monkeypatch):
    monkeypatch.setattr("mixofshow.tuning.conflicts.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=message):
        refuse_impossible(make_settings({**TABLE, "tracker": "none", **change}), "cpu")


def test_prodigy_takes_one_rate_for_all():
    """It was a traceback of the library's, after the pictures were encoded."""
    with pytest.raises(
        SettingsError, match="prodigy: takes one rate for all, found 1e-05, 0.0001, 0.001; set words.rate"
    ):
        refuse_impossible(make_settings({**TABLE, "optimizer.name": "prodigy", "tracker": "none"}), "cpu")
    words = {**TABLE, "optimizer.name": "prodigy", "tracker": "none", "method": "p-plus"}
    refuse_impossible(make_settings(words), "cpu")


def test_words_that_start_too_long_are_refused(golden_pipeline, data):
    with pytest.raises(SettingsError, match=r"words.sigma: 10 makes words \d+ times as long .* may hold 100"):
        tune(golden_pipeline, data, name="mydog", class_word="man", **{"words.sigma": 10.0, "steps": 1})


def test_fp16_is_for_gpus(golden_pipeline, data):
    """Case 17: a traceback, after the pictures were encoded."""
    with pytest.raises(SettingsError, match="fp16: needs a GPU"):
        tune(golden_pipeline, data, name="mydog", class_word="man", precision="fp16")
    refuse_impossible(make_settings({**TABLE, "precision": "fp16", "tracker": "none"}), "cuda")


@pytest.mark.parametrize(("capability", "slow"), [("AVX2", True), ("DEFAULT", True), ("AVX512", False)])
def test_a_cpu_without_bf16_is_said(monkeypatch, capability, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert bool(slow_precision(make_settings({**TABLE, "precision": "bf16"}), "cpu")) == slow
    assert slow_precision(make_settings({**TABLE, "precision": "bf16"}), "cuda") is None
    assert slow_precision(make_settings(TABLE), "cpu") is None


LORA = "sample --concept {} --region 0,0,32,48:a<lora:{}:0.8> --prompt a"


@pytest.fixture
def small(golden_pipeline, golden_concepts, tmp_path, monkeypatch):
    """A folder with two concepts, a fused model and some faulty files, in a place where no base can be loaded."""
    monkeypatch.chdir(tmp_path)
    for concept in golden_concepts:
        concept.save(Path(f"{concept.info.name}.safetensors"))
    fuse(golden_concepts, golden_pipeline, method="average").model.save("fused")
    data = Path("dogx.safetensors").read_bytes()
    Path("damaged.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    Path("list.yaml").write_text("concepts: [dogx.safetensors, damaged.safetensors]")
    Path("list.json").write_text('[{"lora_path": "dogx.safetensors"}, {"lora_path": "gone.safetensors"}]')
    Path("weighed.yaml").write_text("concepts: [dogx.safetensors, manx.safetensors]\nweights: {dogy: 2}")
    save_file({"emb_params": torch.zeros(1, 32)}, "cat.safetensors")
    Path("others.json").write_text('[{"lora_path": "dogx.safetensors"}, {"lora_path": "cat.safetensors"}]')
    suite = "concepts: [{name: NAME, kind: object, class_word: dog, references: train, files: {ed-lora: dogx.safetensors}}]"
    for file, name, more in (("suite", "dogx", "fuse: {weights: {dogy: 2}}"), ("named", "dogy", "")):
        methods = "methods: [ed-lora+gradient]"
        Path(f"{file}.yaml").write_text("\n".join([suite.replace("NAME", name), methods, more]))
    for name, grey in (("00", 200), ("black", 0)):
        Image.new("L", (64, 48), grey).save(f"{name}.png")
    late = "prompt: a\nsteps: 4\nregions: [{box: [0, 0, 32, 48], prompt: b, KEY}]"
    Path("late.yaml").write_text(late.replace("KEY", "first_step: 5"))
    early = late.replace("KEY", "last_step: 2")
    Path("early.yaml").write_text(f"{early}\nimage: 00.png\nimage_strength: 0.5")
    Path("scene.yaml").write_text("prompt: a <dogx>\nregions: [{box: [0, 0, 32, 48], prompt: a <dgx>}]")
    places = ("bases.loading", "concepts.model", "fusion.jobs", "fusion.workers", "evaluation.requests")
    for module in [import_module(f"mixofshow.{place}") for place in places]:  # all, before one takes what is set here
        for name in ("load_base", "load_named_base"):
            monkeypatch.setattr(module, name, _no_base, raising=False)


def _no_base(*_, **__):
    raise AssertionError("a base is loaded")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample --concept gone.safetensors --prompt a", "gone.safetensors: cannot be read"),
        ("sample --concept damaged.safetensors --prompt a", "damaged.safetensors: damaged"),
        (
            "sample --concept dogx.safetensors --prompt <dogy>",
            "unknown concept '<dogy>' in the prompt; did you mean '<dogx>'",
        ),
        ("sample --concept dogx.safetensors --prompt <dogx>! --negative-prompt <manx>", "unknown concept '<manx>'"),
        ("sample --concept dogx.safetensors scene.yaml", "unknown concept '<dgx>'"),
        ("sample --model fused scene.yaml", "unknown concept '<dgx>'"),
        ("sample --prompt <dogx>", "unknown concept '<dogx>' in the prompt; no concept is loaded: give its file as --concept"),
        ("sample --prompt a --grid grid.png --vary num=1,2", "vary: a column is a seed"),
        ("sample --prompt a --grid grid.png --vary stpes=1,2", "did you mean 'steps'"),
        ("sample --prompt a --vary steps=1,2", "--vary: expected --grid beside it"),
        ("sample --prompt a --grid grid.png --show-layout l.png", "--show-layout: expected none with --grid"),
        ("sample --prompt a --grid grid.png --save-regions l.yaml", "--save-regions: expected none with --grid"),
        ("sample --prompt a --mask 00.png", "--mask: expected --image beside it"),
        ("sample --prompt a --image 00.png --mask black.png", "--mask: expected white where the picture is drawn anew, found black"),
        ("sample --prompt a --image 00.png --mask 00.png --upscale 2", "--upscale: expected 1 with a mask, found 2"),
        ("sample --prompt a --attend 0.1 --steps 2", "--attend: expected 0 with fewer than 3 steps"),
        ("sample --prompt a --regions auto --smallest-place 0.5", "--smallest-place: expected at most --largest-place, 0.3"),
        ("sample late.yaml", "first_step: expected a step from 1 to 4, which are done, found 5"),
        ("sample early.yaml", "last_step: expected a step from 3 to 4, which are done, found 2"),
        ("fuse dogx.safetensors damaged.safetensors --out out", "damaged.safetensors: damaged"),
        ("fuse dogx.safetensors --out out --rank 4", "--rank: expected --as-delta beside it"),
        ("fuse list.yaml --out out", "damaged.safetensors: damaged"),
        ("fuse list.json --out out", "gone.safetensors: cannot be read"),
        ("fuse --model fused --add gone.safetensors", "gone.safetensors: cannot be read"),
        ("fuse --model fused --remove dog", "no concept is called 'dog' in this model; did you mean 'dogx'"),
        ("fuse dogx.safetensors manx.safetensors --weights dogy=2 --out out", "no concept is called dogy; did you mean 'dogx'"),
        ("fuse dogx.safetensors --weights horse=2 --as-delta out.safetensors", "no concept is called horse; there are dogx"),
        ("fuse weighed.yaml --out out", "weights: no concept is called dogy"),
        ("fuse others.json --weights dogx=2,cow=1 --out out", "weights: no concept is called cow; there are dogx, cat"),
        ("fuse --model fused --weights dogy=2", "weights: no concept is called dogy; did you mean 'dogx'"),
        ("fuse dogx.safetensors dogx.safetensors --out out", "two concepts claim the placeholder <dogx"),
        ("evaluate suite.yaml", "weights: no concept is called dogy; did you mean 'dogx'"),
        ("evaluate named.yaml", "dogx.safetensors: expected the concept <dogy>, found <dogx>"),
        (LORA.format("dogx.safetensors", "dogy"), "regions: no concept is called dogy; did you mean 'dogx'"),
        (LORA.format("cat.safetensors", "dogy"), "regions: no concept is called dogy; there are cat"),
        ("sample --model fused --region 0,0,32,48:a<lora:dogy:1> --prompt a", "no concept is called dogy; did you mean"),
        ("sample --region 0,0,32,48:a<lora:dogy:1> --prompt a", "no concept is called dogy; there are none"),
        ("fuse --model fused --method gradient --set ridg=1", "did you mean 'ridge'"),
        ("record damaged.safetensors --out out", "damaged.safetensors: damaged"),
        ("convert damaged.safetensors new.safetensors --name new", "damaged.safetensors: damaged"),
        ("convert gone.pt new.safetensors", "gone.pt: cannot be read"),
        ("convert dogx.safetensors new.safetensors --embeddings gone.pt", "gone.pt: cannot be read"),
        ("tune --name a --class-word a --data gone", "gone"),
    ],
)
def test_what_small_files_say_is_told_before_a_base_is_loaded(line, message, small, monkeypatch, capsys):
    """A slip in a prompt, or in a file's name, cost the time that a base takes to load."""
    monkeypatch.setattr("sys.argv", ["mixofshow", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err
