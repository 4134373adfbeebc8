"""Every reader of what comes from outside, fed with a good file that was changed at random.

Whatever comes out: the file is read, or it is one of our errors, exit code 2, in one line that can be printed; within
five seconds and a gigabyte. A change is one of bytes, or one of values: a tree of JSON in which something was replaced,
doubled or taken out. The parts of safetensors and PNG files are changed under correct digests, so that what lies behind
them is reached.
"""

from __future__ import annotations

import copy
import io
import json
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mixofshow import cli
from mixofshow.bases.loading import load_base
from mixofshow.cli.options import assignments
from mixofshow.concepts.concept import DELTA_KEY, Concept, load_concept
from mixofshow.concepts.concept import METADATA_KEY as CONCEPT_KEY
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.concepts.manifest import MANIFEST
from mixofshow.concepts.model import load_model, with_concept
from mixofshow.errors import MixOfShowError
from mixofshow.evaluation.study import build_study, score_study
from mixofshow.evaluation.suite import read_suite
from mixofshow.files import TensorFile
from mixofshow.fusion import store
from mixofshow.fusion.jobs import fused_from
from mixofshow.fusion.jobs import inputs_of as job_inputs
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.solving import check_method
from mixofshow.fusion.statistics import LayerStatistics
from mixofshow.reading import read_table
from mixofshow.sampling.composition import from_options
from mixofshow.sampling.composition import inputs_of as composition_inputs
from mixofshow.sampling.replay import PNG_KEY, read_note
from mixofshow.tuning.captions import read_caption, read_metadata
from mixofshow.tuning.settings import several

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
FEW, MANY = 13, 65
"""Inputs of each reader in `make test` and with the mark slow."""
SECONDS, BYTES = 5, 2**30

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 10**9, 10**20, -(10**30), 1e308, -1e-320, math.inf, -math.inf, math.nan]),
    st.sampled_from(["", "\0", "\ud800", "\x1b[31m", "\u202egnp", "../../etc/passwd", "/dev/zero", "~nobody/x", "[/]"]),
    st.sampled_from(["n" * 300, "a." * 3000, "{}{}", "%s", "<!--<script>", "<a> <b>", "__class__", "os.system"]),
    st.text(max_size=8),
    st.sampled_from([[], {}, [[]], {"": {}}, [0] * 1000, {str(k): k for k in range(300)}, [{"a": [{"b": []}]}]]),
).map(copy.deepcopy)


@st.composite
def trees(draw: st.DrawFn, good: Any) -> Any:
    """The good tree with one to three values replaced, doubled, renamed or taken out."""
    root = {"": copy.deepcopy(good)}
    for _ in range(draw(st.integers(1, 3))):
        above, key = root, ""
        while keys := _keys(above[key]):
            above, key = above[key], draw(st.sampled_from(keys))
            if not draw(st.integers(0, 2)):
                break
        _change(draw, above, key)
        root.setdefault("", None)
    return root[""]


def _keys(tree: Any) -> list[Any]:
    return sorted(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []


def _change(draw: st.DrawFn, above: Any, key: Any) -> None:
    match draw(st.sampled_from(["replace", "replace", "replace", "drop", "double"])):
        case "replace":
            above[key] = draw(HOSTILE)
        case "drop":
            above.pop(key)
        case _ if isinstance(above, list):
            above.insert(key, copy.deepcopy(above[key]))
        case _:
            above[str(draw(HOSTILE))] = copy.deepcopy(above[key])


@st.composite
def bytes_like(draw: st.DrawFn, good: bytes) -> bytes:
    """The good bytes cut, spliced or overwritten."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        part = draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"[" * 2000, b"\xff\xfe", b"\0", b"\n", b": *a"]))
        )
        match draw(st.sampled_from(["cut", "insert", "overwrite", "drop"])):
            case "cut":
                del data[start:]
            case "insert":
                data[start:start] = part
            case "overwrite":
                data[start : start + len(part)] = part
            case _:
                del data[start : start + draw(st.integers(1, 64))]
    return bytes(data)


@dataclass(frozen=True)
class Reader:
    """A good input, how a tree of it becomes a file, and who reads that."""

    tree: Any
    written: Callable[[Any], bytes]
    read: Callable[[Path], object]


def as_json(tree: Any) -> bytes:
    """JSON is YAML, too."""
    return json.dumps(tree).encode()


def as_yaml(tree: Any) -> bytes:
    """Numbers as YAML has them."""
    text = json.dumps(tree)
    return text.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan").encode()


def only_our_errors(read: Callable[[Path], object], path: Path) -> None:
    """What the module promises."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        read(path)
    except MixOfShowError as error:
        assert error.exit_code == 2
        assert str(error).isprintable() and str(error)
        assert len(cli.shortened(str(error))) <= 300
    assert time.monotonic() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def with_body(body: bytes, metadata: Callable[[Any], object]) -> Callable[[Any], bytes]:
    """A tree of a header and what is `about` it becomes a safetensors file of this body."""

    def written(tree: Any) -> bytes:
        if not isinstance(tree, dict) or not isinstance(header := tree.get("header"), dict):
            return as_json(tree)
        text = as_json({**header, "__metadata__": metadata(tree.get("about"))})
        return len(text).to_bytes(8, "little") + text + body

    return written


def sealed(path: Path, key: str, read: Callable[[Path], object]) -> Reader:
    """A file of ours, whose digests are not looked at, with what stands in its metadata under `key`."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header.pop("__metadata__")[key])
    written = with_body(data[8 + length :], lambda about: _written(key, json.dumps(about)))
    return Reader({"about": about, "header": header}, written, read)


@pytest.fixture(scope="module")
def readers(
    golden_pipeline: Any, golden_concepts: tuple[Concept, Concept], tmp_path_factory: Any
) -> Iterator[dict[str, Reader]]:
    """All of them by name. Digests are not looked at: what lies behind them must hold without them."""
    folder = tmp_path_factory.mktemp("good")
    concept = golden_concepts[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixofshow.concepts.concept._metadata", lambda text, _: _written(CONCEPT_KEY, text))
        patch.setattr("mixofshow.concepts.delta._digest", lambda *_: "0")
        patch.setattr("mixofshow.fusion.store._digest", lambda _: "0")
        patch.setattr("mixofshow.fusion.store._metadata", lambda text: _written(store.METADATA_KEY, text))
        for load in ("load_base", "load_named_base"):  # bases are read as readers of their own
            patch.setattr(f"mixofshow.concepts.model.{load}", lambda *_, **__: golden_pipeline)
        yield {
            **_of_tensors(folder, golden_pipeline, concept),
            **_of_settings(),
            **_of_suites(folder),
            **_of_pictures(),
            **_of_models(folder, golden_pipeline, concept),
        }


def _written(key: str, text: str) -> dict[str, str]:
    return {"format": "pt", key: text, store.DIGEST_KEY: "0"}


def _of_tensors(folder: Path, pipeline: Any, concept: Concept) -> dict[str, Reader]:
    concept.save(folder / "concept.safetensors")
    with_concept(pipeline, concept).save_delta(folder / "delta.safetensors")
    moments = torch.eye(3, dtype=torch.float64)
    kept = store.Store(folder / "store").save(
        {"a": [1, "b"]}, "c", {"x": LayerStatistics(moments, 3), "y": LayerStatistics(moments, 4)}
    )

    def statistics(path: Path) -> None:
        recording = store.open_recording(path)
        for name in recording.info.rows:
            recording.statistics(name)

    shapes = {f"{TO_K}.lora_A.weight": [2, 32], f"{TO_K}.lora_B.weight": [24, 2], f"{TO_K}.alpha": []}
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [sum(sizes[:number]), sum(sizes[: number + 1])]}
        for number, (name, shape) in enumerate(shapes.items())
    }
    about = {"ss_network_alpha": "4", "ss_tag_frequency": '{"1_a": {"b": 1}}', "ss_output_name": "dog"}
    foreign = with_body(bytes(sum(sizes)), lambda about: about)
    return {
        "concept": sealed(folder / "concept.safetensors", CONCEPT_KEY, lambda path: load_concept(path, pipeline)),
        "delta": sealed(folder / "delta.safetensors", DELTA_KEY, lambda path: load_model(path, base=GOLDEN_BASE)),
        "recording": sealed(kept.file.path, store.METADATA_KEY, statistics),
        "LoRA of others": Reader(
            {"header": header, "about": about},
            foreign,
            lambda path: open_concept(path, pipeline, ImportSettings(words="man", name="man")),
        ),
        "tensors": Reader({"header": header, "about": about}, foreign, _read_tensors),
    }


def _read_tensors(path: Path) -> None:
    file = TensorFile(path)
    for name in file.shapes():
        file.read(name)


def _of_settings() -> dict[str, Reader]:
    region = {"prompt": "a dog", "box": [0, 0, 32, 64], "strength": 0.5, "weight": 2, "feather": 0.1, "first_step": 1}
    polygon = {"prompt": "a cat", "polygon": [[0, 0], [32, 0], [32, 64]], "negative_prompt": "blurred"}
    drawing = {"steps": 3, "width": 64, "height": 64, "guidance_scale": 2.0, "isolate": 2, "upscale": 1.5}
    composition = {
        "prompt": "two",
        "regions": [region, polygon],
        **drawing,
        "seed": 3,
        "num": 2,
        "regional_lora": False,
    }
    tuning = {"name": "clown", "class_word": "dog", "data": "x", "unet": {"rank": 4, "rate": 1e-4}, "steps": 10}
    concepts = [{"name": "a", "class_word": "b", "data": "c"}, {"name": "d", "class_word": "e", "data": "f"}]
    fusion = {"method": "gradient", "options": {"ridge": 1e-6}, "weights": {"a": 1, "b": 0.5}, "steps": 3, "prior": 0.1}

    def lists(path: Path) -> None:
        shutil.copy(path, path.with_suffix(".yaml"))
        job_inputs([path.with_suffix(".yaml")])
        FusionSettings.of({key: one for key, one in read_table(path).items() if key not in ("concepts", "base")})

    def compose(path: Path) -> None:
        composition_inputs(path, {})
        from_options(path, {})

    return {
        "composition": Reader(composition, as_yaml, compose),
        "tuning": Reader(tuning, as_yaml, lambda path: several(read_table(path), source=str(path))),
        "several concepts": Reader(
            {"base": "emojiland", "concepts": concepts}, as_yaml, lambda path: several(read_table(path))
        ),
        "fusion": Reader(fusion, as_yaml, lambda path: check_method(FusionSettings.of(read_table(path)))),
        "list of concepts": Reader({"concepts": ["a", "b"], "base": "c", "steps": 3}, as_yaml, lists),
        "options": Reader(
            ["ridge=1e-6", "a={b: [1, ~]}"],
            as_json,
            lambda path: assignments(path.read_text("utf-8", "replace").strip('[]"').split('", "')),
        ),
    }


def _of_suites(folder: Path) -> dict[str, Reader]:
    own = {"name": "cat", "kind": "character", "class_word": "cat", "folder": "cat", "files": {"lora": "x"}}
    method = {"tuning": "lora", "fusion": "average", "name": "m", "tune": {"steps": 3}, "fuse": {"options": {}}}
    suite = {
        "concepts": ["clown", own],
        "methods": ["ed-lora+gradient", method],
        "prompts": {"subject": {"place": ["a {}"]}},
        "compositions": {"together": [["clown", "cat"]], "images": 1},
        "tune": {"steps": 5},
    }
    row = [{"prompt": "a cat", "pictures": ["0.png"]}]
    states = {"single": {"cat": row}, "fused": {"cat": row}}
    index = {"references": {"cat": "cat"}, "methods": {"a": states, "b": states}}
    answer = {"item": 0, "left": "a", "right": "b", "image": "a", "text": "b"}
    answers = {"schema": 1, "study": "s", "rater": "r", "items": 2, "answers": [answer, {**answer, "item": 1}]}
    place = folder / "suite"
    (place / "cat").mkdir(parents=True)
    for picture in ("0.png", "cat/0.png"):
        Image.new("RGB", (32, 32)).save(place / picture)

    def study(path: Path) -> None:
        shutil.copy(path, place / "pictures.json")
        build_study(place, ["a,b"], place / "page.html", count=1)

    return {
        "suite": Reader(suite, as_yaml, read_suite),
        "study": Reader(json.loads(json.dumps(index)), as_json, study),
        "answers": Reader(answers, as_json, lambda path: score_study([path])),
    }


def _of_pictures() -> dict[str, Reader]:
    maker = {
        "base": "b",
        "hash": "0",
        "concepts": {"a": "1"},
        "versions": {"torch": "2"},
        "device": "cpu",
        "threads": 1,
    }
    note = {"composition": {"prompt": "a", "regions": [{"prompt": "b", "box": [0, 0, 8, 8]}]}, "maker": maker}

    def png(tree: Any) -> bytes:
        text, data = PngInfo(), io.BytesIO()
        text.add_text(PNG_KEY, json.dumps(tree))
        Image.new("RGB", (8, 8)).save(data, "PNG", pnginfo=text)
        return data.getvalue()

    def metadata(path: Path) -> None:
        shutil.copy(path, path.with_name("metadata.jsonl"))
        read_metadata(path.parent, ["00.png", "01.png"])

    line = {"file_name": "00.png", "text": "a photo"}
    return {
        "picture's note": Reader(note, png, read_note),
        "caption": Reader(
            "a photo of a dog, red, on grass", lambda tree: str(tree).encode("utf-8", "replace"), read_caption
        ),
        "captions": Reader(
            [line, {**line, "file_name": "01.png"}],
            lambda tree: b"\n".join(map(as_json, tree if isinstance(tree, list) else [tree])),
            metadata,
        ),
    }


def _of_models(folder: Path, pipeline: Any, concept: Concept) -> dict[str, Reader]:
    fused = folder / "fused"
    with_concept(pipeline, concept).save(fused)
    manifest = {**json.loads((fused / MANIFEST).read_text()), "settings": {"method": "gradient", "steps": 3}}
    (fused / MANIFEST).write_text(json.dumps(manifest))
    made = {}

    def at(place: str, read: Callable[[], object]) -> Callable[[Path], None]:
        def there(path: Path) -> None:
            kept = (fused / place).read_bytes()
            try:
                shutil.copy(path, fused / place)
                read()
            finally:
                (fused / place).write_bytes(kept)

        return there

    places = ("model_index.json", "unet/config.json", "text_encoder/config.json", "vae/config.json")
    for place in (*places, "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        tree = json.loads((fused / place).read_text())
        made[f"model: {place}"] = Reader(tree, as_json, at(place, lambda: load_base(fused)))
    made["manifest"] = Reader(manifest, as_json, at(MANIFEST, lambda: load_model(fused)))
    made["manifest, edited"] = Reader(manifest, as_json, at(MANIFEST, lambda: fused_from(fused, pipeline)))
    return made


NAMES = (
    *("concept", "delta", "recording", "LoRA of others", "tensors", "composition", "tuning", "several concepts"),
    *("fusion", "list of concepts", "options", "suite", "study", "answers", "picture's note", "caption", "captions"),
    *("manifest", "manifest, edited", "model: model_index.json", "model: unet/config.json"),
    *("model: text_encoder/config.json", "model: vae/config.json", "model: scheduler/scheduler_config.json"),
    "model: tokenizer/tokenizer_config.json",
)


def fuzz(reader: Reader, path: Path, count: int) -> None:
    """Feed a reader with so many inputs, three quarters of which have changed values and the rest changed bytes."""
    good = reader.written(reader.tree)
    path.write_bytes(good)
    reader.read(path)  # what is changed was good
    inputs = st.integers(0, 3).flatmap(
        lambda kind: trees(reader.tree).map(reader.written) if kind else bytes_like(good)
    )

    @seed(0)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=inputs)
    def run(data: bytes) -> None:
        path.write_bytes(data)
        only_our_errors(reader.read, path)

    run()


def test_every_reader_is_named(readers):
    assert sorted(readers) == sorted(NAMES)
    assert FEW * len(NAMES) >= 300 and MANY * len(NAMES) >= 1500


@pytest.mark.parametrize("name", NAMES)
def test_a_few_inputs(name, readers, tmp_path):
    fuzz(readers[name], tmp_path / "input.safetensors", FEW)


@pytest.mark.slow
def test_as_many_concept_files_as_ever(readers, tmp_path):
    fuzz(readers["concept"], tmp_path / "input.safetensors", 846)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_inputs(name, readers, tmp_path):
    fuzz(readers[name], tmp_path / "input.safetensors", MANY)
