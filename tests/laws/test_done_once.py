"""What takes long is done once, or not at all: counted in calls and bytes, since seconds depend on the machine."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from mixofshow import FusionSettings, MixOfShowPipeline, Region, make_settings, tune
from mixofshow.bases import loading, parts
from mixofshow.bases.loading import fingerprint
from mixofshow.concepts.changes import Full, LowRank
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.evaluation import tasks
from mixofshow.evaluation.requests import BaseSource, DrawnBy, ImageRequest
from mixofshow.evaluation.tasks import DrawTask
from mixofshow.fusion import recording
from mixofshow.fusion.recording import Source, record
from mixofshow.sampling import replay as replaying
from mixofshow.sampling.replay import maker_of, replay, save_picture
from mixofshow.sampling.settings import Composition
from mixofshow.tuning import conflicts
from mixofshow.tuning.conflicts import slow_precision

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"


@pytest.fixture
def counted(monkeypatch):
    """`counted(module, name)`: a function's calls are counted, by its name."""
    calls = Counter()

    def count(module, name):
        own = getattr(module, name)

        def called(*args, **kwargs):
            calls[name] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(module, name, called)
        return calls

    return count


@pytest.mark.parametrize("size", [(64, 64), (128, 64)])
def test_masks_of_regions_that_are_kept_apart_are_made_for_maps_that_read_them(size, xl_pipeline):
    """SDXL's finest map, on which a mask would be the largest, has no attention."""
    seen = set()

    def note(pipeline, step, timestep, tensors):
        handle = next(iter(pipeline.unet.attn_processors.values())).regional
        seen.add((len(handle.apart), len(handle.grids)))
        return {}

    width, height = size
    regions = [Region("a man", (0, 0, width // 2, height)), Region("a house", (width // 2, 0, width, height))]
    how = {"width": width, "height": height, "num_inference_steps": 3, "callback_on_step_end": note}
    MixOfShowPipeline.of(ConceptModel(xl_pipeline))("a photo", regions=regions, isolate=True, **how)
    assert seen == {(2, 3)}


def test_previews_need_no_factors(golden_pipeline, tmp_path, counted):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    table = {"name": "thing", "class_word": "man", "base": str(GOLDEN_BASE), "data": tmp_path, "steps": 2}
    asked = {"method": "custom-diffusion", "prior.weight": 0.0, "preview_every": 1, "save_every": 0, "tracker": "none"}
    calls, shown = counted(torch.linalg, "svd"), []

    def preview(concept, step):
        shown.append((calls["svd"], {type(change) for change in concept.deltas.values()}))

    found = tune(make_settings({**table, **asked}), golden_pipeline, preview=preview)
    assert shown == [(0, {Full})] * 2
    assert calls["svd"] == len(found.deltas) > 0
    assert {type(change) for change in found.deltas.values()} <= {Full, LowRank}


def test_a_picture_is_replayed_with_the_model_hashed_once(golden_pipeline, golden_concepts, tmp_path, counted):
    draw = MixOfShowPipeline.of(with_concept(golden_pipeline, golden_concepts[0]))
    wanted = replaying.resolved(Composition(prompt="a man", steps=1, width=64, height=64), draw)
    save_picture(Image.new("RGB", (64, 64)), tmp_path / "a.png", wanted, maker_of(draw))
    calls = counted(replaying, "model_hash")
    replay(draw, tmp_path / "a.png", tmp_path / "b.png")
    assert calls["model_hash"] == 1


def test_a_suite_hashes_a_model_once_for_all_its_pictures(tmp_path, counted):
    tasks._model.cache_clear()
    model, calls = DrawnBy(BaseSource(str(GOLDEN_BASE)), "base"), counted(replaying, "model_hash")
    for seed in range(2):
        wanted = Composition(prompt="a man", steps=1, width=64, height=64, seed=seed)
        DrawTask(model, (ImageRequest(model, wanted),), tmp_path).work()
    assert calls["model_hash"] == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_layers_are_looked_up_once_for_a_recording(steps, golden_pipeline, golden_concepts, counted):
    settings = FusionSettings(steps=steps, prompts=("a {}",), picture_prompts=("a {}",))
    names, calls = list(golden_concepts[0].deltas), counted(recording, "layer")
    record(golden_pipeline, Source.of(golden_concepts[0], settings), names, settings)
    assert calls["layer"] == len(names)


def test_a_base_is_hashed_again_only_when_its_weights_are_others(golden_pipeline, monkeypatch):
    base, read = copy.deepcopy(golden_pipeline), Counter()
    own = loading.raw

    def raw(tensor):
        read["bytes"] += tensor.nbytes
        return own(tensor)

    monkeypatch.setattr(parts, "GLIMPSED", 8)
    monkeypatch.setattr(loading, "raw", raw)
    first = fingerprint(base)
    whole = read["bytes"]
    assert fingerprint(base) == first
    assert read["bytes"] == whole > 0
    weight = base.unet.mid_block.resnets[0].conv1.weight
    for change in (
        lambda: weight[3, 3].add_(1),  # a few numbers, told by torch's own count of changes
        lambda: weight.data.add_(1),  # all of them behind its back
        lambda: weight.data[1, 2, 0].add_(1),  # or a few, as a row of a table of words is set
        lambda: setattr(weight, "data", torch.zeros_like(weight)),
    ):
        with torch.no_grad():
            change()
        found = fingerprint(base)
        assert found not in (first, None)
        first = found
    loading._KNOWN.pop(base.unet)
    assert fingerprint(base) == first


def test_a_model_is_hashed_again_only_when_it_is_another(golden_pipeline, golden_concepts, monkeypatch):
    base, read = copy.deepcopy(golden_pipeline), Counter()
    own = replaying.raw

    def raw(tensor):
        read["bytes"] += tensor.nbytes
        return own(tensor)

    monkeypatch.setattr(replaying, "raw", raw)
    draws = [MixOfShowPipeline.single(base, one) for one in golden_concepts]
    first, other = (replaying.model_hash(draw) for draw in draws)
    whole = read["bytes"]
    assert replaying.model_hash(draws[1]) == other != first
    assert 0 < read["bytes"] - whole < whole / 100  # the words
    assert replaying.model_hash(draws[0]) == first
    base.vae.decoder.conv_in.bias.data.add_(1)
    assert replaying.model_hash(draws[0]) not in (first, other)


def test_bf16_without_instructions_for_it_says_what_it_costs(monkeypatch):
    settings = make_settings({"name": "thing", "class_word": "man", "data": ".", "precision": "bf16"})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(conflicts, "_times_as_long", lambda dtype: {torch.bfloat16: 7.25}[dtype])
    assert "this CPU (AVX2) has no instructions for it; a product of matrices takes 7.2 times" in slow_precision(
        settings, "cpu"
    )
    assert slow_precision(settings, "cuda") is None
    monkeypatch.undo()
    assert 0 < conflicts._times_as_long(torch.float32) < 100
