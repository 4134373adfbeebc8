"""What holds for bases of every family, on tiny random ones: all that is done with SD 1.x is done with SD 2.x and SDXL."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from mixofshow import MixOfShowPipeline, Region
from mixofshow.bases.families import conditions, family_of, text_encoders, token_width
from mixofshow.bases.layers import count_groups, cross_attentions, layer, lora_layers, matrix, text_groups
from mixofshow.bases.loading import fingerprint, load_base
from mixofshow.concepts.changes import LowRank
from mixofshow.concepts.concept import Concept, ConceptInfo, check_fits, load_concept, vocabulary
from mixofshow.concepts.interchange.embeddings import file_words, trigger_words
from mixofshow.concepts.interchange.exporting import export_concept
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.concepts.model import ConceptModel, load_model, load_unfused, with_concept
from mixofshow.concepts.prompts import encode_prompts, layerwise, prompt_ids
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import BaseModelError, ConceptFileError
from mixofshow.evaluation.suite import make_suite, run_suite
from mixofshow.fusion.settings import PAPER, FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.sampling.latents import decode, initial_latents
from mixofshow.sampling.replay import model_hash
from mixofshow.tuning.adapters import METHODS, class_vector, initial_words
from mixofshow.tuning.losses import Batch, Pictures, TrainingLoss
from mixofshow.tuning.trainer import tune
from tests.conftest import pictures_in, short_run

SIZE = {"width": 64, "height": 48}
PROMPTS = ["photo of a red castle", "", "a man near the beach, " * 20]
XL_GROUPS = [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, *(k for k in (5, 6, 7) for _ in range(3)), 8, 8, 9, 9, 10, 10]
FAMILIES = ["v_pipeline", "xl_pipeline"]
SHORT = FusionSettings(**PAPER, steps=2)


@pytest.fixture(params=FAMILIES)
def base(request):
    return request.getfixturevalue(request.param)


def concept_on(base, name, seed):
    """Random words and a random change of every layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).half().float()

    info = ConceptInfo(
        name=name,
        words=(f"<{name}1>", f"<{name}2>"),
        class_word="man",
        initializers=("random", "man"),
        layers=count_groups(base.unet),
        family=family_of(base).name,
        base="tiny",
        base_fingerprint=fingerprint(base),
    )
    shapes = {layer_name: matrix(module).shape for layer_name, module in lora_layers(base).items()}
    changes = {
        one: LowRank(normal(2, inputs, scale=inputs**-0.5), normal(outputs, 2, scale=0.1))
        for one, (outputs, inputs) in shapes.items()
    }
    return Concept(info, normal(2, info.layers, token_width(base), scale=0.02), changes)


@pytest.fixture
def concepts(base):
    return concept_on(base, "cat", 1), concept_on(base, "dog", 2)


def latents(pipeline, *args, **options):
    found = pipeline(*args, **SIZE, num_inference_steps=3, output_type="latent", **options).images
    return found if isinstance(found, torch.Tensor) else torch.stack(list(found))


def start(base):
    return initial_latents(base, [torch.Generator().manual_seed(3)], **SIZE)


def test_layers_of_a_block_share_a_variant_of_the_prompt(xl_pipeline, v_pipeline, golden_pipeline):
    assert list(text_groups(xl_pipeline.unet).values()) == XL_GROUPS
    assert list(text_groups(xl_pipeline.unet)) == list(cross_attentions(xl_pipeline.unet))
    for pipeline in (v_pipeline, golden_pipeline):
        assert list(text_groups(pipeline.unet).values()) == list(range(16))


def test_sdxl_at_full_width_has_70_layers_in_11_groups():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    assert (len(cross_attentions(unet)), count_groups(unet)) == (70, 11)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_plain_prompts_are_encoded_as_diffusers_does(xl_pipeline, prompt):
    found = encode_prompts(xl_pipeline, [prompt], Vocabulary())
    hidden, negative, pooled, negative_pooled = xl_pipeline.encode_prompt(prompt)
    assert torch.equal(found.hidden, hidden[:, None].expand(-1, 11, -1, -1))
    assert torch.equal(found.pooled, pooled)
    assert not negative.any() and not negative_pooled.any()  # which is what no negative prompt means to SDXL


def test_words_have_a_vector_in_every_text_encoder(xl_pipeline):
    """Against diffusers, for one group after another, with the group's vectors as tokens of both encoders."""
    concept = concept_on(xl_pipeline, "cat", 1)
    found = encode_prompts(xl_pipeline, ["photo of a <cat>, man"], vocabulary([concept]))
    pooled = []
    for group in range(11):
        plain = copy.deepcopy(xl_pipeline)
        for encoder, own in zip(text_encoders(plain), concept.embeddings[:, group].split([16, 24], 1), strict=True):
            encoder.tokenizer.add_tokens(list(concept.info.words))
            encoder.model.resize_token_embeddings(encoder.first_id + 2, mean_resizing=False)
            encoder.table.data[-2:] = own
        # transformers finds the end by the largest id if the configuration says 2, and here words have larger ones.
        plain.text_encoder_2.text_model.eos_token_id = plain.tokenizer_2.eos_token_id
        hidden, _, of_group, _ = plain.encode_prompt("photo of a <cat1> <cat2>, man")
        torch.testing.assert_close(found.hidden[:, group], hidden, atol=1e-5, rtol=1e-5)
        pooled.append(of_group)
    torch.testing.assert_close(found.pooled, torch.stack(pooled).mean(0), atol=1e-5, rtol=1e-5)
    assert (pooled[0] - pooled[1]).norm() > 1e-4 * pooled[0].norm()


def test_each_layer_reads_its_groups_text(base):
    text, kept = torch.randn(1, count_groups(base.unet), 77, base.unet.config.cross_attention_dim), {}
    handles = [
        one.to_k.register_forward_pre_hook(lambda module, args, name=name: kept.update({name: args[0]}))
        for name, one in cross_attentions(base.unet).items()
    ]
    pooled = torch.zeros(1, 12) if family_of(base).name == "stable-diffusion-xl" else None
    with layerwise(base.unet), torch.no_grad():
        base.unet(torch.zeros(1, 4, 8, 8), 1, text, **conditions(base, pooled, torch.zeros(1, 4, 8, 8)))
    for handle in handles:
        handle.remove()
    assert all(torch.equal(kept[name], text[:, group]) for name, group in text_groups(base.unet).items())


@pytest.mark.parametrize("asked", [{}, {"negative_prompt": "lowres"}, {"guidance_scale": 1.0}])
def test_pictures_without_concepts_are_those_of_diffusers(base, asked, relative_error):
    asked = {"guidance_scale": 5.0, "num_images_per_prompt": 2, **asked}
    first = torch.cat([start(base), -start(base)])
    expected = latents(base, PROMPTS[0], latents=first.clone(), **asked)
    draw = MixOfShowPipeline.of(ConceptModel(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixofshow.sampling.pipeline.initial_latents", lambda *_, **__: first.clone())
        assert relative_error(latents(draw, PROMPTS[0], **asked), expected) < 1e-5


def test_the_family_of_a_pipeline_of_ours_is_its_bases(base):
    draw = MixOfShowPipeline.of(ConceptModel(base))
    assert family_of(draw) == family_of(base)
    assert [one.part for one in text_encoders(draw)] == [one.part for one in text_encoders(base)]


def test_a_region_of_all_replaces_the_text_and_not_the_pooled_prompt(xl_pipeline, relative_error):
    whole, inside = (xl_pipeline.encode_prompt(one) for one in ("a man", "a beach"))
    expected = latents(
        xl_pipeline,
        prompt_embeds=inside[0],
        pooled_prompt_embeds=whole[2],
        guidance_scale=1.0,
        latents=start(xl_pipeline),
    )
    draw = MixOfShowPipeline.of(ConceptModel(xl_pipeline))
    found = latents(draw, "a man", regions=[Region("a beach", (0, 0, 64, 48))], guidance_scale=1.0, seed=3)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(latents(draw, "a man", guidance_scale=1.0, seed=3), expected) > 1e-4


@pytest.fixture
def make(tmp_path):
    """`make(key=value, …)`: settings of two steps on two small pictures."""
    # The middle of the UNet must see more than one place, or it has nothing to attend to.
    quick = {"base": "tiny", "steps": 2, "batch_size": 2, "pictures.size": 128, "prior.count": 2}
    rates = {"words.rate": 0.01, "text_encoder.rate": 0.01, "unet.rate": 0.01}
    return short_run(pictures_in(tmp_path / "pictures", "red", "blue"), **quick, **rates)


def states(base):
    parts = (base.unet, *(one.model for one in text_encoders(base)))
    return [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_tunes_and_leaves_the_base_as_it_was(base, make, method, tmp_path):
    before, start = states(base), initial_words(base, make(method=method), torch.Generator().manual_seed(0))()
    concept = tune(make(method=method, **{"loss.attention_weight": 0.01, "prior.count": 2}), base)
    for old, new in zip(before, states(base), strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert (concept.embeddings.transpose(0, 1) - start).abs().amax() > 1e-3
    # What lies behind the states that the UNet reads has no part in them.
    skipped = [
        f"text_encoder.text_model.encoder.layers.{3 - k}." for k in range(1, family_of(base).skipped_text_layers + 1)
    ]
    tuned = {name for name, change in concept.deltas.items() if change.matrix().any()}
    assert tuned == {name for name in concept.deltas if not name.startswith(tuple(skipped))}
    concept.save(tmp_path / "thing.safetensors")
    assert load_concept(tmp_path / "thing.safetensors", base).hash == concept.hash


def test_recomputing_activations_tunes_the_same(base, make):
    usual, again = (tune(make(gradient_checkpointing=on), base) for on in (False, True))
    torch.testing.assert_close(again.embeddings, usual.embeddings, atol=2e-3, rtol=1e-2)
    assert {one.model.training for one in text_encoders(base)} == {False}


def test_the_loss_is_of_the_bases_own_prediction(base, make):
    """With the class word's vector for a placeholder, the loss is that of plain diffusers asked for the class word."""
    settings = make(method="textual-inversion")
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(2))
    timesteps, ones = torch.tensor([10, 700]), torch.ones(2, 1, 6, 8)
    words = initial_words(base, settings, generator)
    objective = TrainingLoss(base, words, {}, settings)
    known = Vocabulary({"<thing>": torch.empty(0)})
    ids = prompt_ids(base, ["photo of a <thing>"] * 2, known)
    batch = Batch(Pictures(clean, ones, ones, torch.tensor([False, False])), noise, timesteps, ids)
    found = objective(batch)["denoising"]

    hidden, _, *pooled = base.encode_prompt(
        ["photo of a man"] * 2, device=base.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[:3]
    noisy = objective.scheduler.add_noise(clean, noise, timesteps)
    velocity = objective.scheduler.get_velocity(clean, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity}[base.scheduler.config.prediction_type]
    sizes = torch.tensor([[48.0, 64, 0, 0, 48, 64]] * 2)
    told = {"added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": sizes}} if pooled else {}
    made = base.unet(noisy, timesteps, hidden, **told).sample
    torch.testing.assert_close(found, (made - target).square().sum(1).mean(), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_class_words_vector_is_that_of_every_encoder(base):
    rows = [one.table[one.tokenizer("man", add_special_tokens=False).input_ids[-1]] for one in text_encoders(base)]
    assert torch.equal(class_vector(base, "man"), torch.cat(rows))


def test_one_concept_fused_alone_is_that_concept(base, concepts):
    fused = fuse(concepts[:1], base, SHORT)
    assert fused.model.weights.keys() == with_concept(base, concepts[0]).weights.keys() == concepts[0].deltas.keys()
    assert max(one.residual for one in fused.layers.values()) <= 1e-3
    assert all(one.rows for one in fused.layers.values())


def test_refitting_brings_every_family_nearer_to_its_concepts(base, concepts):
    losses = fuse(concepts, base, SHORT.model_copy(update={"method": "average", "prior": 1.0, "refit": 24})).refitted
    assert losses.keys() == {one.info.name for one in concepts}
    assert sum(after for _, after in losses.values()) < 0.9 * sum(before for before, _ in losses.values())


def test_strength_counts_for_every_text_encoder(base, concepts):
    for strength in (0, 1):
        for name, weight in with_concept(base, concepts[0], strength).weights.items():
            assert torch.equal(weight, matrix(layer(base, name))) == (strength == 0), name


def test_a_fused_folder_is_drawn_from_by_plain_diffusers(base, concepts, tmp_path, relative_error):
    fused = fuse(concepts, base, SHORT.model_copy(update={"refine": 1, "prior": 0.1, "guidance_scale": 3.0})).model
    fused.save(tmp_path / "fused")
    kind = {"stable-diffusion-xl": StableDiffusionXLPipeline, "stable-diffusion": StableDiffusionPipeline}
    plain = kind[family_of(base).name].from_pretrained(tmp_path / "fused")
    plain.set_progress_bar_config(disable=True)
    draw, loaded = MixOfShowPipeline.of(fused), MixOfShowPipeline.from_pretrained(tmp_path / "fused")
    seed = torch.Generator().manual_seed(3)
    expected = latents(plain, PROMPTS[0], latents=start(base), generator=seed)
    assert relative_error(latents(draw, PROMPTS[0], seed=3, guidance_scale=plain.guidance_scale), expected) < 1e-5
    asked = {"regions": [Region("a <cat>", (0, 0, 32, 48)), Region("a <dog>", (32, 0, 64, 48))], "seed": 3}
    own = latents(draw, "a man and a man", **asked)
    assert relative_error(latents(loaded, "a man and a man", **asked), own) < 1e-5
    assert relative_error(own, latents(draw, "a man and a man", seed=3)) > 1e-4
    # Each word is also a token of plain diffusers; finding the end of the prompt must not be misled by that.
    with torch.no_grad():
        ids = [one.tokenizer("a <cat1>", return_tensors="pt").input_ids for one in text_encoders(plain)]
        for one, own_ids in zip(text_encoders(plain), ids, strict=True):
            output = one.model(own_ids, output_hidden_states=True)
            if hasattr(output, "text_embeds"):
                assert torch.allclose(output.text_embeds, one.model.text_projection(output.last_hidden_state[:, -1]))


def test_deltas_and_regional_lora(base, concepts, tmp_path, relative_error):
    base.save_pretrained(tmp_path / "tiny")
    base = load_base(tmp_path / "tiny")
    concepts = [dataclasses.replace(one, info=one.info.model_copy(update={"base": "tiny"})) for one in concepts]
    fused = fuse(concepts, base, SHORT).model
    fused.save(tmp_path / "fused")
    fused.save_delta(tmp_path / "fused.safetensors")
    asked = {"regions": [Region("a <cat>", (0, 0, 32, 48))], "seed": 3}
    folder = MixOfShowPipeline.from_pretrained(tmp_path / "fused")
    delta = MixOfShowPipeline.of(load_model(tmp_path / "fused.safetensors", base=tmp_path / "tiny"))
    assert relative_error(latents(delta, "a man", **asked), latents(folder, "a man", **asked)) < 1e-4
    unfused = MixOfShowPipeline.of(load_unfused(tmp_path / "fused", base=tmp_path / "tiny"))
    assert (
        relative_error(latents(unfused, "a man", regional_lora=True, **asked), latents(folder, "a man", **asked)) > 1e-4
    )


class Colours:
    """A scorer of features that are given: mean colours, and the same for every text."""

    def images(self, images):
        return torch.stack([torch.tensor(one.resize((1, 1)).getpixel((0, 0))).float() + 1 for one in images])

    def texts(self, texts):
        return torch.ones(len(texts), 3)


def test_evaluation_sees_every_family(base, concepts, tmp_path, monkeypatch):
    monkeypatch.setattr("mixofshow.evaluation.suite.scorer_for", lambda *which, **how: Colours())
    base.save_pretrained(tmp_path / "tiny")
    concepts[0].save(tmp_path / "cat.safetensors")
    (tmp_path / "held-out").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "held-out" / "0.png")
    info, files = concepts[0].info, {"ed-lora": str(tmp_path / "cat.safetensors")}
    concept = {"name": info.name, "kind": "object", "class_word": info.class_word, "files": files}
    table = {
        "base": str(tmp_path / "tiny"),
        "concepts": [{**concept, "references": str(tmp_path / "held-out")}],
        "methods": ["ed-lora+average"],
        "prompts": {"subject": {"context": ["a photo of a {}"]}},
        **{"prior_prompts": [], "images_per_prompt": 1, "steps": 1, "imagenet": False},
    }
    found = run_suite(make_suite(table), tmp_path / "out")["methods"]["ed-lora+average"]
    assert found["by_concept"]["image_alignment"].keys() == {info.name}
    assert found["distance_to_training"] == {"single": None, "fused": None}


def test_a_pictures_hash_is_of_every_text_encoder(base):
    draw, found = MixOfShowPipeline.of(ConceptModel(base)), set()
    for encoder in (None, *text_encoders(base)):
        if encoder:
            encoder.table[0, 0] += 1
        found.add(model_hash(draw))
    assert len(found) == 1 + len(text_encoders(base))


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_other_tools_have_the_same_change_of_every_layer(xl_pipeline, to, tmp_path):
    concept = concept_on(xl_pipeline, "cat", 1)
    export_concept(concept, xl_pipeline, tmp_path / "out", to)
    (file,) = (one for one in (tmp_path / "out").glob("*.safetensors") if "words" not in one.name)
    words = load_file(tmp_path / "out" / "cat-words.safetensors")
    both = torch.cat([words["clip_l"], words["clip_g"]], 1).float()
    torch.testing.assert_close(both, concept.embeddings.mean(1))

    again = open_concept(file, xl_pipeline, ImportSettings(embeddings=tmp_path / "out" / "cat-words.safetensors"))
    torch.testing.assert_close(again.embeddings[:, 0], both, atol=1e-4, rtol=1e-3)
    assert again.deltas.keys() == concept.deltas.keys()
    draw = MixOfShowPipeline.of(ConceptModel(xl_pipeline))
    draw.load_lora_weights(file)
    for name, change in concept.deltas.items():
        torch.testing.assert_close(again.deltas[name].matrix(), change.matrix(), atol=1e-6, rtol=1e-3)
        found = layer(xl_pipeline, name).get_delta_weight(draw.get_active_adapters()[0])
        torch.testing.assert_close(found, change.matrix(), atol=1e-6, rtol=1e-5)


def test_a_loras_trigger_words_are_those_of_every_encoder(xl_pipeline):
    found = trigger_words({}, xl_pipeline, ImportSettings(words="man beach"), "lora")
    ids = xl_pipeline.tokenizer("man beach", add_special_tokens=False).input_ids
    rows = torch.cat([one.table[ids] for one in text_encoders(xl_pipeline)], 1)
    assert torch.equal(found.vectors[:, 0], rows)


@pytest.mark.parametrize("shapes", [((2, 16), (1, 24)), ((16,), (24,))])
def test_tables_of_other_tools_that_do_not_fit_together(shapes):
    tables = {name: torch.zeros(shape) for name, shape in zip(("clip_l", "clip_g"), shapes, strict=True)}
    with pytest.raises(ConceptFileError, match="as many words in each"):
        file_words(tables, "words.safetensors", plain=True)


def test_in_half_precision_sdxls_autoencoder_works_in_single(xl_pipeline):
    latents = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0)).half()
    xl_pipeline.vae.half()
    found = decode(xl_pipeline, latents, "pt")
    assert (found.dtype, xl_pipeline.vae.dtype) == (torch.float32, torch.float16)
    assert torch.equal(found, decode_in_single(xl_pipeline, latents))


def decode_in_single(pipeline, latents):
    vae = copy.deepcopy(pipeline.vae).float()
    return (vae.decode(latents.float() / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def test_concepts_of_another_family_are_refused(xl_pipeline, v_pipeline):
    with pytest.raises(ConceptFileError, match="family 'stable-diffusion-xl', this one is 'stable-diffusion'"):
        check_fits(concept_on(xl_pipeline, "cat", 1), v_pipeline, "cat.safetensors")


def test_words_longer_than_one_encoders_own_are_refused(xl_pipeline):
    concept = concept_on(xl_pipeline, "cat", 1)
    concept.embeddings[1, 4, 20] = 1e3  # the second encoder's part
    with pytest.raises(ConceptFileError, match="length 1e\\+03"):
        check_fits(concept, xl_pipeline, "cat.safetensors")


def test_a_base_without_one_of_its_text_encoders_is_refused(xl_pipeline, tmp_path):
    xl_pipeline.text_encoder = None
    xl_pipeline.save_pretrained(tmp_path / "half")
    with pytest.raises(BaseModelError, match="no text_encoder"):
        load_base(tmp_path / "half")
