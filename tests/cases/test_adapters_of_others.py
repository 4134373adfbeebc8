"""All spellings and kinds of adapter that a promised format has, as their own tools make them.

Covers issue 19 §2.4; cases 03 (SDXL's original names), 05 (peft's configuration), 13 (bundled words), 25 (many vectors,
ParameterDict), 30 (LoHa, LoKr, DoRA; the cause of what does not fit).
"""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch.nn import functional

from mixofshow.bases.layers import layer, matrix, tunable_layers
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.interchange.adapter_keys import _original
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.errors import ConceptFileError

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
TO_Q, TO_K, CONV = f"unet.{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn2.to_k", "unet.down_blocks.0.resnets.0.conv1"
FED, SHORTCUT = f"unet.{BLOCK}.ff.net.2", "unet.up_blocks.1.resnets.0.conv_shortcut"
TARGETS = [name.removeprefix("unet.") for name in (TO_Q, FED, CONV, SHORTCUT)]
DOG = ImportSettings(words="dog", name="dog")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# ---- peft's own folders, for which peft itself says what they mean

CONFIGS = {
    "alpha": peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=TARGETS),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=8,
        alpha_pattern={"attn1.to_q": 3, r"^mid_block\.attentions\.0\.transformer_blocks\.0\.ff\.net\.2": 5},
        rank_pattern={"conv1": 2},
        target_modules=TARGETS,
    ),
    "DoRA": peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=TARGETS),
    "LoHa": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "LoHa, Tucker": peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=TARGETS),
    "LoKr, Tucker": peft.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, target_modules=TARGETS),
    "LoKr, whole": peft.LoKrConfig(r=64, alpha=3, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_merges_is_the_concepts_change(golden_pipeline, tmp_path, kind):
    unet = peft.get_peft_model(copy.deepcopy(golden_pipeline.unet), copy.deepcopy(CONFIGS[kind]))
    for name, parameter in unet.named_parameters():
        if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            parameter.data = torch.randn(parameter.shape) / 4
    unet.save_pretrained(tmp_path / "adapter")
    merged = unet.merge_and_unload()
    for given in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        concept = open_concept(given, golden_pipeline, DOG)
        assert concept.deltas.keys() == {f"unet.{path}" for path in TARGETS}
        for name, change in concept.deltas.items():
            own = matrix(merged.get_submodule(name.removeprefix("unet.")))
            close(change.matrix(), own - matrix(layer(golden_pipeline, name)))
    concept.save(tmp_path / "concept.safetensors")
    assert load_concept(tmp_path / "concept.safetensors", golden_pipeline).hash == concept.hash


def test_a_pattern_that_is_more_than_a_name_is_refused(golden_pipeline, tmp_path):
    unet = peft.get_peft_model(copy.deepcopy(golden_pipeline.unet), peft.LoraConfig(r=1, target_modules=TARGETS))
    unet.peft_config["default"].alpha_pattern = {"(a+)+b": 2}
    unet.save_pretrained(tmp_path)
    with pytest.raises(ConceptFileError, match="is a regular expression"):
        open_concept(tmp_path, golden_pipeline, DOG)


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_factors_that_began_as_parts_of_the_base_are_refused(golden_pipeline, tmp_path, begun):
    """Untrained, they change nothing; they were read as a change of two thirds of the weight, or twice."""
    config = peft.LoraConfig(r=4, init_lora_weights=begun, target_modules=TARGETS[:1])
    peft.get_peft_model(copy.deepcopy(golden_pipeline.unet), config).save_pretrained(tmp_path)
    with pytest.raises(ConceptFileError, match=f"began as parts of the base \\({begun}\\)"):
        open_concept(tmp_path, golden_pipeline, DOG)


# ---- LyCORIS, as kohya's scripts write it


def kohya(name):
    return "lora_" + name.replace(".", "_")


def test_a_convolution_in_three_parts(golden_pipeline, tmp_path):
    """LoCon with a Tucker core: three convolutions behind one another."""
    out, inputs, *kernel = layer(golden_pipeline, CONV).weight.shape
    down, mid, up = torch.randn(2, inputs, 1, 1), torch.randn(3, 2, *kernel), torch.randn(out, 3, 1, 1) / 9
    named = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_file({f"{kohya(CONV)}.{key}": one for key, one in named.items()}, tmp_path / "locon.safetensors")
    change = open_concept(tmp_path / "locon.safetensors", golden_pipeline, DOG).deltas[CONV]
    picture = torch.randn(1, inputs, 8, 8)
    theirs = functional.conv2d(functional.conv2d(functional.conv2d(picture, down), mid, padding=1), up) / 2
    ours = functional.conv2d(picture, change.matrix().view(out, inputs, *kernel), padding=1)
    close(ours, theirs)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_magnitude_of_outputs_or_inputs(golden_pipeline, tmp_path, axis):
    weight = layer(golden_pipeline, FED).weight
    down, up = torch.randn(2, weight.shape[1]) / 9, torch.randn(weight.shape[0], 2) / 9
    magnitude = torch.rand([size if at == axis else 1 for at, size in enumerate(weight.shape)]) + 0.5
    named = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude, "alpha": torch.tensor(2.0)}
    save_file({f"{kohya(FED)}.{key}": one for key, one in named.items()}, tmp_path / "dora.safetensors")
    change = open_concept(tmp_path / "dora.safetensors", golden_pipeline, DOG).deltas[FED]
    close((weight + change.matrix()).norm(dim=1 - axis), magnitude.flatten())
    merged = weight + up @ down
    close(weight + change.matrix(), magnitude * merged / merged.norm(dim=1 - axis, keepdim=True))


def test_whole_changes_and_scales_of_lycoris(golden_pipeline, tmp_path):
    out, inputs = layer(golden_pipeline, TO_Q).weight.shape
    one, two = torch.randn(2, 2), torch.randn(out // 2, inputs // 2)
    full = torch.randn(layer(golden_pipeline, CONV).weight.shape)
    wa, wb = (torch.randn(2, out, 1), torch.randn(2, 1, layer(golden_pipeline, FED).weight.shape[1]))
    tensors = {
        f"{kohya(TO_Q)}.lokr_w1": one,
        f"{kohya(TO_Q)}.lokr_w2": two,
        f"{kohya(TO_Q)}.alpha": torch.tensor(7.0),  # means nothing of matrices that are whole
        f"{kohya(CONV)}.diff": full,
        f"{kohya(FED)}.hada_w1_a": wa[0],
        f"{kohya(FED)}.hada_w2_a": wa[1],
        f"{kohya(FED)}.hada_w1_b": wb[0],
        f"{kohya(FED)}.hada_w2_b": wb[1],
        f"{kohya(FED)}.alpha": torch.tensor(0.5),
    }
    save_file(tensors, tmp_path / "lycoris.safetensors")
    deltas = open_concept(tmp_path / "lycoris.safetensors", golden_pipeline, DOG).deltas
    close(deltas[TO_Q].matrix(), torch.kron(one, two))
    close(deltas[CONV].matrix(), full.flatten(1))
    close(deltas[FED].matrix(), 0.5 * (wa[0] @ wb[0]) * (wa[1] @ wb[1]))


# ---- SDXL under the original code's names, for which diffusers says what they mean


def test_original_names_are_what_diffusers_makes_of_them(xl_pipeline, tmp_path):
    names = [name for name in tunable_layers(xl_pipeline) if name.startswith("unet.")]
    tensors = {}
    for name in names:
        out, inputs, *kernel = layer(xl_pipeline, name).weight.shape
        key = "lora_unet_" + _original(name.removeprefix("unet.").replace(".", "_"), xl_pipeline.unet)
        tensors[f"{key}.lora_down.weight"] = torch.randn(1, inputs, *kernel)
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, 1, *[1] * len(kernel))
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    concept = open_concept(tmp_path / "kohya.safetensors", xl_pipeline, DOG)
    assert sorted(concept.deltas) == sorted(names)
    theirs = StableDiffusionXLPipeline(**copy.deepcopy(xl_pipeline.components), add_watermarker=False)
    theirs.load_lora_weights(tmp_path / "kohya.safetensors", adapter_name="a")
    found = {path: module for path, module in theirs.unet.named_modules() if hasattr(module, "lora_A")}
    assert sorted(f"unet.{path}" for path in found) == sorted(names)
    for path, module in found.items():
        close(concept.deltas[f"unet.{path}"].matrix(), module.get_delta_weight("a").flatten(1))


def test_every_tool_spells_a_layer_in_its_own_way(xl_pipeline, tmp_path):
    query, text = "down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q", "encoder.layers.1.mlp.fc1"
    original = query.replace("down_blocks.1.attentions.1", "input_blocks.5.1")
    spellings = {
        f"unet.{query}": (
            f"lora_unet_{query.replace('.', '_')}",
            f"lora_unet_{original.replace('.', '_')}",
            f"unet.{original}",
            f"lora_unet.{query}",
            f"diffusion_model.{original}",
            f"lycoris_unet_{query.replace('.', '_')}",
            f"base_model.model.{query}",
        ),
        f"text_encoder_2.text_model.{text}": (
            f"lora_te2_text_model_{text.replace('.', '_')}",
            f"clip_g.text_model.{text}",
            f"text_encoder_2.{text}",
            f"lora_te2.text_model.{text}",
        ),
        f"text_encoder.text_model.{text}": (
            f"lora_te1_text_model_{text.replace('.', '_')}",
            f"clip_l.text_model.{text}",
        ),
    }
    for name, keys in spellings.items():
        out, inputs = layer(xl_pipeline, name).weight.shape
        for key in keys:
            halves = {f"{key}.lora_down.weight": torch.ones(1, inputs), f"{key}.lora_up.weight": torch.ones(out, 1)}
            save_file(halves, tmp_path / "lora.safetensors")
            assert list(open_concept(tmp_path / "lora.safetensors", xl_pipeline, DOG).deltas) == [name], key


# ---- words


def lora(pipeline):
    out, inputs = layer(pipeline, TO_Q).weight.shape
    key = kohya(TO_Q)
    return {f"{key}.lora_down.weight": torch.ones(1, inputs), f"{key}.lora_up.weight": torch.ones(out, 1)}


def test_bundled_words_are_called_as_the_bundle_says(golden_pipeline, xl_pipeline, tmp_path):
    table, large, small = torch.randn(2, 32) / 9, torch.randn(2, 16) / 9, torch.randn(2, 24) / 9
    save_file(lora(golden_pipeline) | {"bundle_emb.Ema.string_to_param.*": table}, tmp_path / "one.safetensors")
    one = open_concept(tmp_path / "one.safetensors", golden_pipeline)
    assert (one.info.name, one.info.words) == ("ema", ("<ema1>", "<ema2>"))
    close(one.embeddings[:, 0], table)
    bundle = {"bundle_emb.ema.clip_l": large, "bundle_emb.ema.clip_g": small}
    save_file(lora(xl_pipeline) | bundle, tmp_path / "xl.safetensors")
    xl = open_concept(tmp_path / "xl.safetensors", xl_pipeline)
    assert (xl.info.name, xl.info.words) == ("ema", ("<ema1>", "<ema2>"))
    close(xl.embeddings[:, 0], torch.cat([large, small], dim=1))
    two = {f"bundle_emb.{name}.emb_params": table[:1].clone() for name in ("ema", "rin")}
    save_file(lora(golden_pipeline) | two, tmp_path / "both.safetensors")
    both = open_concept(tmp_path / "both.safetensors", golden_pipeline)
    assert (both.info.name, both.info.words) == ("both", ("<ema>", "<rin>"))


def test_as_many_vectors_as_a_prompt_has_room_for(golden_pipeline, tmp_path):
    save_file({"emb_params": torch.randn(75, 32) / 9}, tmp_path / "negative.safetensors")
    concept = open_concept(tmp_path / "negative.safetensors", golden_pipeline)
    concept.save(tmp_path / "concept.safetensors")
    assert len(load_concept(tmp_path / "concept.safetensors", golden_pipeline).info.words) == 75


def test_a_name_that_ends_in_a_number_is_told_from_the_words_number(golden_pipeline, tmp_path):
    save_file({"emb_params": torch.randn(2, 32) / 9}, tmp_path / "v2.safetensors")
    assert open_concept(tmp_path / "v2.safetensors", golden_pipeline).info.words == ("<v2-1>", "<v2-2>")


def test_textual_inversions_own_table_of_parameters(golden_pipeline, tmp_path):
    vectors = torch.nn.Parameter(torch.randn(2, 32) / 9)
    table = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": vectors})}
    torch.save(table, tmp_path / "original.pt")
    concept = open_concept(tmp_path / "original.pt", golden_pipeline)
    assert concept.info.words == ("<original1>", "<original2>")
    close(concept.embeddings[:, 0], vectors.data)


WRAPPERS = (
    "_orig_mod.",
    "module.",
    "base_model.model._orig_mod.",
    "unet.module.",
    "unet.base_model.model.",
    "model.unet.",
)


@pytest.mark.parametrize("front", WRAPPERS)
def test_what_wrapped_the_model_names_no_layer(golden_pipeline, tmp_path, front):
    out, inputs = layer(golden_pipeline, TO_Q).weight.shape
    down, up, name = torch.randn(2, inputs), torch.randn(out, 2), front + TO_Q.removeprefix("unet.")
    save_file(
        {f"{name}.lora_A.my-style.weight": down, f"{name}.lora_B.my-style.weight": up}, tmp_path / "x.safetensors"
    )
    close(open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG).deltas[TO_Q].matrix(), up @ down)


@pytest.mark.parametrize("front", ["text_encoders.clip_l.transformer.text_model.", "clip_l.transformer.", "lora_te1."])
def test_text_encoders_have_several_names(golden_pipeline, tmp_path, front):
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    out, inputs = layer(golden_pipeline, name).weight.shape
    key = front + name.split("text_model.")[1]
    tensors = {f"{key}.lora_down.weight": torch.ones(1, inputs), f"{key}.lora_up.weight": torch.ones(out, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert list(open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG).deltas) == [name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("whole", [torch.int64, torch.float64, torch.float8_e4m3fn])
def test_numbers_of_every_width(golden_pipeline, tmp_path, dtype, whole):
    tensors = {key: one.to(dtype) for key, one in lora(golden_pipeline).items()}
    save_file(tensors | {f"{kohya(TO_Q)}.alpha": torch.tensor(2).to(whole)}, tmp_path / "x.safetensors")
    change = open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG).deltas[TO_Q].matrix()
    close(change, torch.full_like(change, 2.0))


def test_a_kronecker_product_with_a_tucker_core(golden_pipeline, tmp_path):
    """With several blocks, where the product of the core is no contiguous tensor."""
    one, left, right, core = torch.randn(2, 2), torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 2, 3, 3)
    parts = {"lokr_w1": one, "lokr_w2_a": left, "lokr_w2_b": right, "lokr_t2": core, "alpha": torch.tensor(1.0)}
    save_file({f"{kohya(CONV)}.{name}": tensor for name, tensor in parts.items()}, tmp_path / "x.safetensors")
    two = torch.einsum("ijkl,ip,jr->prkl", core, left, right)
    expected = torch.einsum("ab,prkl->apbrkl", one, two).reshape(16, 16, 3, 3) / 2
    close(open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG).deltas[CONV].matrix(), expected.flatten(1))


def test_a_scale_that_is_assumed_is_said(golden_pipeline, tmp_path, caplog):
    """Case 05: nothing in the file, nor beside it, says alpha."""
    save_file(lora(golden_pipeline), tmp_path / "x.safetensors")
    open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)
    assert len([line for line in caplog.messages if "alpha" in line]) == 1  # once, by one voice
    caplog.clear()
    save_file(lora(golden_pipeline) | {f"{kohya(TO_Q)}.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)
    assert "alpha" not in caplog.text


@pytest.mark.parametrize("beside", [True, False])
def test_changes_of_nothing_are_said(golden_pipeline, tmp_path, caplog, beside):
    """alpha 0 was taken without a word, in the file and in peft's configuration."""
    file = tmp_path / ("adapter_model.safetensors" if beside else "x.safetensors")
    save_file(lora(golden_pipeline) | ({} if beside else {f"{kohya(TO_Q)}.alpha": torch.tensor(0.0)}), file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 0}))
    open_concept(file, golden_pipeline, DOG)
    assert f"1 of 1 layers change nothing, their alpha or their weights being 0, as {TO_Q}" in caplog.text


def test_one_magnitude_of_all_is_refused(golden_pipeline, tmp_path):
    save_file(lora(golden_pipeline) | {f"{kohya(TO_Q)}.dora_scale": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with pytest.raises(ConceptFileError, match="magnitudes, found 1"):
        open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)


# ---- what does not fit


def test_the_cause_is_said_in_one_line(golden_pipeline, xl_pipeline, tmp_path):
    names = list(tunable_layers(xl_pipeline))
    tensors = {}
    for name in names:
        out, inputs, *kernel = layer(xl_pipeline, name).weight.shape
        key = name.replace(".", "_").replace("text_encoder_2", "lora_te2").replace("text_encoder", "lora_te1")
        key = f"lora_{key}" if key.startswith("unet") else key
        tensors[f"{key}.lora_down.weight"] = torch.ones(1, inputs, *kernel)
        tensors[f"{key}.lora_up.weight"] = torch.ones(out, 1, *[1] * len(kernel))
    save_file(tensors, tmp_path / "sdxl.safetensors")
    with pytest.raises(ConceptFileError, match=r"made for SDXL, this base is of SD 1\.x; give") as error:
        open_concept(tmp_path / "sdxl.safetensors", golden_pipeline, DOG)
    assert len(str(error.value)) < 300


def test_what_says_another_base_but_fits_is_taken_with_a_word(golden_pipeline, tmp_path, caplog):
    save_file(lora(golden_pipeline), tmp_path / "x.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)
    assert "made for SDXL, this base is of SD 1.x" in caplog.text


@pytest.mark.parametrize(
    "said", ["sd_1.5", "sd_v1", "SD 1.5", "sd15", "Stable-Diffusion-V1/lora", "stable-diffusion-1.5", "None", ""]
)
def test_every_spelling_of_a_kind_of_base_is_understood(golden_pipeline, tmp_path, caplog, said):
    """Issue 19 §2.4, §2.5: ai-toolkit's `sd_1.5` was called another base than SD 1.x."""
    save_file(lora(golden_pipeline), tmp_path / "x.safetensors", {"ss_base_model_version": said})
    open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)
    assert "made for" not in caplog.text


@pytest.mark.parametrize(
    ("said", "kind"),
    [("sd_2.1", "SD 2.x"), ("sd21", "SD 2.x"), ("sdxl_1.0", "SDXL"), ("SD XL", "SDXL"), ("SSD-1B", "SSD-1B"), ("x", "x")],
)
def test_another_kind_is_called_by_its_name(golden_pipeline, tmp_path, caplog, said, kind):
    save_file(lora(golden_pipeline), tmp_path / "x.safetensors", {"ss_base_model_version": said})
    open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)
    assert f"made for {kind}, this base is of SD 1.x" in caplog.text


def test_layers_tell_the_kind_before_a_finetuned_models_name(xl_pipeline, tmp_path, caplog):
    name = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    out, inputs = layer(xl_pipeline, name).weight.shape
    halves = {f"{name}.lora_down.weight": torch.ones(1, inputs), f"{name}.lora_up.weight": torch.ones(out, 1)}
    save_file(halves, tmp_path / "x.safetensors", {"ss_base_model_version": "Pony"})
    open_concept(tmp_path / "x.safetensors", xl_pipeline, DOG)
    assert "made for" not in caplog.text


def test_another_prediction_than_the_bases_is_said(golden_pipeline, v_pipeline, tmp_path, caplog):
    """Issue 19 §2.5: a LoRA of a v-prediction model was put on one that predicts noise without a word."""
    for own, said, told in (
        (golden_pipeline, "v", "predicts v_prediction, this one predicts epsilon"),
        (v_pipeline, "epsilon", "predicts epsilon, this one predicts v_prediction"),
        (golden_pipeline, "epsilon", None),
        (golden_pipeline, "flow", None),
    ):
        caplog.clear()
        save_file(lora(own), tmp_path / "x.safetensors", {"modelspec.prediction_type": said})
        open_concept(tmp_path / "x.safetensors", own, DOG)
        assert told in caplog.text if told else "predicts" not in caplog.text


@pytest.mark.parametrize("more", ["diff", "hada_w1_b", "lokr_w1"])
def test_a_layer_is_of_one_kind(golden_pipeline, tmp_path, more):
    """Of a LoRA beside a full change, the LoRA was dropped without a word."""
    change = torch.ones(layer(golden_pipeline, TO_Q).weight.shape)
    save_file(lora(golden_pipeline) | {f"{kohya(TO_Q)}.{more}": change}, tmp_path / "x.safetensors")
    with pytest.raises(ConceptFileError, match="parts of several kinds of adapter at once: .*LoRA"):
        open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)


def test_a_layer_stands_under_one_name(golden_pipeline, tmp_path):
    """Of a layer under diffusers' and the original code's name, the first change was dropped without a word."""
    again = {key.replace("mid_block_attentions_0", "middle_block_1"): one for key, one in lora(golden_pipeline).items()}
    save_file(lora(golden_pipeline) | again, tmp_path / "x.safetensors")
    with pytest.raises(ConceptFileError, match="middle_block_1_.* is there twice, under two names"):
        open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lokr_w1": (4, 2), "lokr_w2": (8, 12)}, r"expected \(out, in\) = \(24, 32\), found \(32, 24\)"),
        ({"hada_w1_a": (32, 9), "hada_w1_b": (9, 24), "hada_w2_a": (32, 9), "hada_w2_b": (9, 24)}, r"found \(32, 24\)"),
        ({"hada_w1_a": (24, 2), "hada_w1_b": (), "hada_w2_a": (24, 2), "hada_w2_b": (2, 32)}, r"found hada_w1_b \(\)"),
        ({"lora_down.weight": (24,), "lora_up.weight": (24, 2)}, r"found down \(24,\)"),
    ],
)
def test_parts_make_a_change_of_the_layers_shape(golden_pipeline, tmp_path, parts, message):
    """That of another shape was read in rows of this one's length; parts without two dimensions were tracebacks."""
    named = {f"{kohya(TO_K)}.{key}": torch.ones(shape) for key, shape in parts.items()}
    save_file(named, tmp_path / "x.safetensors")
    with pytest.raises(ConceptFileError, match=message):
        open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG)


def test_biases_and_norms_are_left_out_with_a_word(golden_pipeline, tmp_path, caplog):
    more = {f"{kohya(CONV)}.diff_b": torch.ones(8), "lora_unet_conv_norm_out.w_norm": torch.ones(8)}
    save_file(lora(golden_pipeline) | more, tmp_path / "x.safetensors")
    assert list(open_concept(tmp_path / "x.safetensors", golden_pipeline, DOG).deltas) == [TO_Q]
    assert "2 layers left out" in caplog.text


@pytest.mark.parametrize(("texts", "given"), [({}, {}), ({"alpha": 1}, {}), ({}, {"unet_alpha": 1.0})])
def test_a_scale_that_nobody_says_is_said(golden_pipeline, tmp_path, caplog, texts, given):
    """Issue 19 §2.5: a LoRA with neither alpha nor configuration was read at scale 1 without a word."""
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(24, 2)}
    tensors |= {f"{key}.alpha": torch.tensor(1.0)} if texts else {}
    save_file(tensors, tmp_path / "thing.safetensors")
    open_concept(tmp_path / "thing.safetensors", golden_pipeline, ImportSettings(words="dog", **given))
    said = "no alpha in it nor beside it: its changes are read at scale 1; `unet_alpha` and `text_encoder_alpha`"
    assert (said in caplog.text) == (not texts and not given)
