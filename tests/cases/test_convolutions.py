"""Convolutions are layers that a concept may change, as any: what they mean is what peft makes of them.

Covers issue 19 §2.4 (LoCon: convolutions count as layers that a concept may change) for the file, applying and export.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file

from mixofshow.bases.layers import kernel_of, layer, matrix, tunable_layers
from mixofshow.concepts.changes import DOWN, FULL, UP, Full, LowRank
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.interchange.convert import convert
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ConvertSettings, ImportSettings
from mixofshow.concepts.model import with_concept
from mixofshow.errors import ConceptFileError

CONV, DOWNWARDS = "unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.downsamplers.0.conv"
CHANGED = (
    CONV,
    DOWNWARDS,
    "unet.up_blocks.1.resnets.0.conv_shortcut",
    "unet.mid_block.resnets.1.time_emb_proj",
    "unet.mid_block.attentions.0.proj_in",
    "unet.conv_in",
    "unet.conv_out",
)


@pytest.fixture
def halves(golden_pipeline):
    """Random factors of some layers' changes, rank 2, in the shapes that peft has."""
    shapes = {name: layer(golden_pipeline, name).weight.shape for name in CHANGED}
    return {
        name: (torch.randn(2, *shape[1:]) / 8, torch.randn(shape[0], 2, *[1] * len(shape[2:])) / 8)
        for name, shape in shapes.items()
    }


@pytest.fixture
def concept(golden_concepts, halves):
    """The first golden concept with changes of those layers alone, one of them in full; as its file keeps them."""
    deltas = {name: LowRank.of(down.half().float(), up.half().float()) for name, (down, up) in halves.items()}
    deltas[DOWNWARDS] = Full(deltas[DOWNWARDS].matrix().half().float(), deltas[DOWNWARDS].kernel)
    return dataclasses.replace(golden_concepts[0], deltas=deltas)


def noise(pipeline):
    text = torch.randn(1, 5, pipeline.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(2))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return pipeline.unet(latents, 10, encoder_hidden_states=text).sample


def test_applying_equals_peft(golden_pipeline, halves, concept):
    theirs = copy.copy(golden_pipeline)
    theirs.unet = copy.deepcopy(golden_pipeline.unet)
    paths = [name.removeprefix("unet.") for name in CHANGED]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=paths), theirs.unet, "theirs")
    for name, (down, up) in halves.items():
        wrapper = theirs.unet.get_submodule(name.removeprefix("unet."))
        wrapper.lora_A["theirs"].weight.data, wrapper.lora_B["theirs"].weight.data = down, up
    ours = dataclasses.replace(concept, deltas={name: LowRank.of(*pair) for name, pair in halves.items()})
    before = noise(golden_pipeline)
    with with_concept(golden_pipeline, ours).active():
        torch.testing.assert_close(noise(golden_pipeline), noise(theirs), rtol=1e-4, atol=1e-5)
        assert (noise(golden_pipeline) - before).norm() > 0.1 * before.norm()
    assert torch.equal(noise(golden_pipeline), before)


def test_the_file_has_the_shapes_that_others_know(golden_pipeline, concept, tmp_path):
    concept.save(tmp_path / "conv.safetensors")
    tensors, found = (
        load_file(tmp_path / "conv.safetensors"),
        load_concept(tmp_path / "conv.safetensors", golden_pipeline),
    )
    out, inputs, *kernel = layer(golden_pipeline, CONV).weight.shape
    assert tensors[CONV + DOWN].shape == (2, inputs, *kernel)
    assert tensors[CONV + UP].shape == (out, 2, 1, 1)
    assert tensors[DOWNWARDS + FULL].shape == layer(golden_pipeline, DOWNWARDS).weight.shape
    assert tensors["unet.mid_block.attentions.0.proj_in" + DOWN].ndim == 2  # as in version 1
    assert found.hash == concept.hash
    for name, one in concept.deltas.items():
        assert torch.equal(one.matrix(), found.deltas[name].matrix())
        assert one.kernel == found.deltas[name].kernel


@pytest.mark.parametrize("kernel", [(1, 9), (9, 1), (3,), (1, 1, 3, 3)])
def test_another_kernel_is_refused(golden_pipeline, concept, tmp_path, kernel):
    change = concept.deltas[CONV]
    wrong = dataclasses.replace(concept, deltas={CONV: dataclasses.replace(change, kernel=kernel)})
    with pytest.raises(ConceptFileError, match="kernel|expected|dimensions|shape"):
        wrong.save(tmp_path / "conv.safetensors")
        load_concept(tmp_path / "conv.safetensors", golden_pipeline)


@pytest.mark.parametrize("only", [CONV, "unet.mid_block.attentions.0.proj_in"])
def test_a_file_says_the_oldest_version_that_can_read_it(concept, tmp_path, only):
    dataclasses.replace(concept, deltas={only: concept.deltas[only]}).save(tmp_path / "conv.safetensors")
    with safe_open(tmp_path / "conv.safetensors", "pt") as file:
        version = json.loads(file.metadata()["mixofshow"])["format_version"]
    assert version == (2 if only == CONV else 1)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_others_read_it(golden_pipeline, concept, tmp_path, to):
    low = {name: change for name, change in concept.deltas.items() if name != DOWNWARDS}
    concept = dataclasses.replace(concept, deltas=low)
    concept.save(tmp_path / "conv.safetensors")
    (line, _) = convert(tmp_path / "conv.safetensors", tmp_path / "out", golden_pipeline, ConvertSettings(to=to))
    lora = line.split(": ")[0]
    theirs = StableDiffusionPipeline(**copy.deepcopy(golden_pipeline.components), requires_safety_checker=False)
    theirs.load_lora_weights(lora)
    found = {path: module for path, module in theirs.unet.named_modules() if hasattr(module, "lora_A")}
    assert {f"unet.{path}" for path in found} == set(concept.deltas)
    for path, module in found.items():
        change = concept.deltas[f"unet.{path}"].matrix()
        torch.testing.assert_close(module.get_delta_weight("default_0").flatten(1), change, rtol=1e-5, atol=1e-6)
    again = open_concept(lora, golden_pipeline, ImportSettings(words="dog", name="conv"))
    for name, change in concept.deltas.items():
        torch.testing.assert_close(again.deltas[name].matrix(), change.matrix())
        assert again.deltas[name].kernel == change.kernel


@pytest.mark.parametrize("base", ["golden_pipeline", "xl_pipeline"])
def test_layers_are_listed_as_a_picture_passes_them(base, request):
    pipeline = request.getfixturevalue(base)
    layers = {name: module for name, module in tunable_layers(pipeline).items() if name.startswith("unet.")}
    passed: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: passed.append(name))
        for name, module in layers.items()
    ]
    more = {}
    if pipeline.unet.config.addition_embed_type:
        more = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, 12), "time_ids": torch.zeros(1, 6)}}
    text = torch.zeros(1, 5, pipeline.unet.config.cross_attention_dim)
    with torch.no_grad():
        pipeline.unet(torch.zeros(1, 4, 16, 16), 10, encoder_hidden_states=text, **more)
    for handle in handles:
        handle.remove()
    early = ("unet.conv_in", "unet.time_embedding", "unet.add_embedding")  # side by side: which first means nothing
    assert [name for name in passed if not name.startswith(early)] == [
        name for name in layers if not name.startswith(early)
    ]
    assert {module for module in pipeline.unet.modules() if hasattr(module, "kernel_size")} <= set(layers.values())
    assert kernel_of(pipeline.unet.conv_in) == (3, 3)
    assert matrix(pipeline.unet.conv_in).shape[1] == 9 * pipeline.unet.config.in_channels
