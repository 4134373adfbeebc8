"""What others do to a base beside us is neither lost nor mistaken for the base: B9, B11 to B15, B18, B21, B22, B6."""

from __future__ import annotations

import copy
import threading

import accelerate
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch._dynamo.eval_frame import OptimizedModule, _NullDecorator
from torch.nn.utils import parametrize

from mixofshow import MixOfShowPipeline, Region, fuse, load_unfused
from mixofshow.bases.layers import cross_attentions, layer
from mixofshow.bases.loading import fingerprint
from mixofshow.bases.parts import adapters
from mixofshow.concepts.adapters import replaced
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import ConceptModel, load_model, with_concept
from mixofshow.errors import BadInputError, BaseModelError, ConceptFileError, SettingsError

ASKED = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 3}
REGIONS = [Region("a <dogx>", (0, 0, 32, 48)), Region("a <manx>", (32, 0, 64, 48))]


@pytest.fixture
def base(golden_pipeline):
    return copy.deepcopy(golden_pipeline)


@pytest.fixture
def with_lora(base):
    torch.manual_seed(1)
    base.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"]), "mine")
    return base


def draw(model, **asked):
    return MixOfShowPipeline.of(model)("a <dogx>", **(ASKED | asked))[0].tobytes()


def test_a_regional_lora_of_a_reloaded_model_is_refused(fused, golden_concepts, tmp_path):
    """B9: it drew W_fused + ΔW instead of W0 + ΔW."""
    fused.save(tmp_path / "fused")
    again = MixOfShowPipeline.from_pretrained(tmp_path / "fused")
    with pytest.raises(BadInputError, match="load_unfused"):
        again("", regions=REGIONS, regional_lora=golden_concepts, **ASKED)
    apart = load_unfused(tmp_path / "fused", base="tests/goldens/pipeline")
    apart.pipeline.scheduler = fused.pipeline.scheduler
    found, expected = (
        np.frombuffer(draw(one, regions=REGIONS, regional_lora=True), np.uint8).astype(int) for one in (apart, fused)
    )
    assert np.abs(found - expected).max() <= 1  # files hold half precision


def test_adapters_do_not_count_in_the_fingerprint(with_lora, golden_pipeline, golden_concepts):
    """B14, and the same where layers are parametrized while a concept is tuned."""
    assert fingerprint(with_lora) == fingerprint(golden_pipeline)
    joined = copy.deepcopy(golden_pipeline)
    joined.unet.fuse_qkv_projections()
    assert fingerprint(joined) == fingerprint(golden_pipeline)
    with_concept(with_lora, golden_concepts[0])
    path = next(path for path in cross_attentions(with_lora.unet) if path.startswith("mid"))
    other = copy.deepcopy(golden_pipeline)
    parametrize.register_parametrization(other.unet.get_submodule(path).to_v, "weight", torch.nn.Identity())
    assert fingerprint(other) == fingerprint(golden_pipeline)


def test_a_parametrized_layer_takes_other_weights(base, golden_fused):
    """As custom-diffusion's layers are while it previews: the weights were set on a copy."""
    name = next(name for name in golden_fused.weights if name.endswith("attn2.to_k"))
    parametrize.register_parametrization(layer(base, name), "weight", torch.nn.Identity())
    with torch.no_grad(), replaced(base, {name: golden_fused.weights[name]}):
        assert torch.equal(layer(base, name).weight, golden_fused.weights[name])


@pytest.mark.parametrize("verb", ["fuse", "save", "save_delta"])
def test_adapters_are_left_alone(verb, with_lora, golden_concepts, tmp_path):
    """B13: they went into the saved folder, which nothing could load. (B11, tuning, is tested with tuning.)"""
    model = ConceptModel(with_lora, vocabulary(golden_concepts))
    verbs = {
        "fuse": lambda: fuse(golden_concepts, with_lora),
        "save": lambda: MixOfShowPipeline.of(model).save_pretrained(tmp_path / "m"),
        "save_delta": lambda: model.save_delta(tmp_path / "d.safetensors"),
    }
    with pytest.raises(BadInputError, match="attached.*unload_lora_weights"):
        verbs[verb]()
    assert adapters(with_lora) == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_lora_cannot_be_fused_under_a_concept(with_lora, golden_concepts):
    """B12: it was gone in every layer that the concept changes."""
    pipeline = MixOfShowPipeline.single(with_lora, golden_concepts[0])
    with pytest.raises(SettingsError, match="fuse_lora"):
        pipeline.fuse_lora()
    with_lora.unet.fuse_lora()
    with pytest.raises(BaseModelError, match="unfuse_lora"):
        pipeline("a <dogx>", **ASKED)


def test_a_lora_beside_a_concept_comes_and_goes(with_lora, golden_pipeline, golden_concepts):
    """B21: which was as it should be."""
    alone = draw(with_concept(golden_pipeline, golden_concepts[0]))
    pipeline = MixOfShowPipeline.single(with_lora, golden_concepts[0])
    beside = pipeline("a <dogx>", **ASKED)[0].tobytes()
    assert beside != alone
    pipeline.disable_lora()
    assert pipeline("a <dogx>", **ASKED)[0].tobytes() == alone
    pipeline.enable_lora()
    assert pipeline("a <dogx>", **ASKED)[0].tobytes() == beside


@pytest.mark.parametrize("verb", [with_concept, lambda base, concept: fuse([concept], base)])
def test_concepts_of_another_base_are_refused(verb, base, golden_concepts):
    """B15: only reading a file with a pipeline looked at this."""
    with torch.no_grad():
        base.unet.conv_in.weight += 0.01
    with pytest.raises(ConceptFileError, match=f"concept <{golden_concepts[0].info.name}>: made for base"):
        verb(base, golden_concepts[0])


def test_offloaded_weights_are_not_missed(base, fused):
    """B22: the base's weights were drawn with instead."""
    draw = MixOfShowPipeline.of(ConceptModel(base, fused.vocabulary, fused.weights))
    accelerate.cpu_offload(base.unet, torch.device("cpu"))
    with pytest.raises(BaseModelError, match="offloaded.*enable_model_cpu_offload"):
        draw("a <dogx>", **ASKED)
    MixOfShowPipeline.of(ConceptModel(base, fused.vocabulary))("a <dogx>", **ASKED)


def test_two_threads_over_one_base_draw_as_one(fused, golden_concepts):
    """B18: one picture was wrong, and the other thread died."""
    models = [fused, with_concept(fused.pipeline, golden_concepts[0])]
    alone = [draw(model, regions=REGIONS[:1]) for model in models]
    found = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: draw(models[k % 2], regions=REGIONS[:1])}))
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(k) for k in range(4)] == alone * 2


def test_compiled_parts_are_seen_through(base, fused, tmp_path):
    """B6: their names begin anew; compiling itself is PyTorch's, and takes too long here."""
    expected = draw(ConceptModel(base, fused.vocabulary, fused.weights), regions=REGIONS)
    before = fingerprint(base)
    for part in ("unet", "text_encoder", "vae"):
        setattr(base, part, OptimizedModule(getattr(base, part), _NullDecorator()))
    assert fingerprint(base) == before
    model = ConceptModel(base, fused.vocabulary, fused.weights, fused.concepts)
    assert draw(model, regions=REGIONS) == expected
    model.save(tmp_path / "model")
    assert load_model(tmp_path / "model").concept_hashes == model.concept_hashes


def test_a_unet_without_prompts_is_named():
    with pytest.raises(BaseModelError, match="no cross-attention"):
        cross_attentions(torch.nn.Linear(1, 1))
