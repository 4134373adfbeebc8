"""Text is read before the layer that a file says, and a concept may be taken for another base, if that is allowed.

Covers issue 19 §2.14, §2.16 and §2.5 (clip skip); cases 23 and 29.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from mixofshow.bases.families import clip_skip_said, skip_text_layers, text_encoders
from mixofshow.bases.loading import fingerprint, load_base
from mixofshow.concepts import concept
from mixofshow.concepts.concept import follow_clip_skip, load_concept
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.concepts.model import ConceptModel, load_model, load_unfused, with_concept
from mixofshow.concepts.prompts import encode_prompts
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import BaseModelError, ConceptFileError, SettingsError
from mixofshow.evaluation.fusion_report import write_fusion_report
from mixofshow.fusion.jobs import make_job
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.drawing import draw_pictures, open_pipeline
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.replay import model_hash, read_note

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
ASKED = {"prompt": "a <dogx>", "width": 64, "height": 48, "steps": 1}
TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
QUICK = FusionSettings(method="average", refine=0, steps=2)


@pytest.fixture
def own(golden_pipeline):
    """A pipeline whose text encoder's configuration may be changed."""
    return StableDiffusionPipeline(**copy.deepcopy(golden_pipeline.components), requires_safety_checker=False)


@pytest.fixture
def sister(own, tmp_path):
    """A folder of a base of the same shapes."""
    with torch.no_grad():
        own.unet.conv_in.weight.add_(1e-2)
    own.save_pretrained(tmp_path / "realistic")
    return tmp_path / "realistic"


# ---- clip skip


@pytest.mark.parametrize("base", ["own", "xl_pipeline"])
@pytest.mark.parametrize("skip", [None, 0, 1])
def test_what_is_read_is_what_diffusers_reads(base, skip, request):
    pipeline = request.getfixturevalue(base)
    skip_text_layers(pipeline, skip)
    found = encode_prompts(pipeline, ["a photo of a dog"], Vocabulary())
    plain = {
        "prompt": "a photo of a dog",
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    # What diffusers asks for has gone from transformers 5.6 on.
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    kind = StableDiffusionXLPipeline if base == "xl_pipeline" else StableDiffusionPipeline
    expected = kind.encode_prompt(pipeline, **plain, clip_skip=skip or None)
    torch.testing.assert_close(found.hidden[:, 0], expected[0])


def test_one_encoder_of_two(xl_pipeline):
    both = encode_prompts(xl_pipeline, ["a dog"], Vocabulary()).hidden
    skip_text_layers(xl_pipeline, [0, 1])
    one = encode_prompts(xl_pipeline, ["a dog"], Vocabulary()).hidden
    width = text_encoders(xl_pipeline)[0].width
    assert torch.equal(one[..., :width], both[..., :width])
    assert not torch.allclose(one[..., width:], both[..., width:])


def test_that_of_one_encoder_is_told_and_followed(xl_pipeline, anime):
    skip_text_layers(xl_pipeline, "0,1")
    assert [one.clip_skip for one in text_encoders(xl_pipeline)] == [0, 1]
    said = {"clip_skip": clip_skip_said(xl_pipeline)}
    made_so = dataclasses.replace(anime, info=anime.info.model_copy(update={"settings": said}))
    for one in text_encoders(xl_pipeline):
        del one.model.config.clip_skip
    follow_clip_skip(xl_pipeline, [made_so])
    assert clip_skip_said(xl_pipeline) == said["clip_skip"] == "0,1"


@pytest.mark.parametrize("skip", ["", "one", "0;1", "0,", "0.5"])
def test_what_is_no_number_of_layers_is_refused_before_a_base_is_loaded(skip):
    with pytest.raises(BaseModelError, match="expected a number, or one for each text encoder, as 0,1, found"):
        load_base("nowhere", clip_skip=skip)


@pytest.mark.parametrize("skip", [-1, 3, 10**9, [0], [0, 1, 0], "0,1,0", "-1", "0,3"])
def test_more_layers_than_there_are_cannot_be_skipped(xl_pipeline, skip):
    with pytest.raises(BaseModelError, match="`clip_skip`: expected"):
        skip_text_layers(xl_pipeline, skip)


def test_a_saved_model_is_read_the_same(own, tmp_path):
    skip_text_layers(own, 1)
    own.save_pretrained(tmp_path / "anime")
    assert text_encoders(load_base(tmp_path / "anime"))[0].skipped == 1
    assert text_encoders(load_base(tmp_path / "anime", clip_skip=0))[0].skipped == 0
    config = tmp_path / "anime" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "clip_skip": "many"}))
    with pytest.raises(BaseModelError, match="`clip_skip`: expected 0 to 2"):
        encode_prompts(load_base(tmp_path / "anime"), ["a dog"], Vocabulary())


@pytest.fixture
def anime(golden_pipeline, tmp_path):
    """A concept of a LoRA whose metadata says, as kohya's scripts count, clip skip 2."""
    key = "lora_" + TO_K.replace(".", "_")
    halves = {f"{key}.lora_down.weight": torch.ones(1, 32), f"{key}.lora_up.weight": torch.ones(24, 1)}
    texts = {"ss_tag_frequency": json.dumps({"10_dog": {"dog": 3}}), "ss_clip_skip": "2"}
    save_file(halves, tmp_path / "anime.safetensors", texts)
    return open_concept(tmp_path / "anime.safetensors", golden_pipeline)


def test_the_metadata_is_kept_and_said(anime, golden_pipeline, tmp_path, caplog):
    again = (tmp_path / "anime.safetensors").rename(tmp_path / "again.safetensors")  # of each file it is said once
    open_concept(again, golden_pipeline, ImportSettings(words="dog"))
    assert anime.info.settings["clip_skip"] == 1
    assert "made with clip skip 1, this base has 0; `clip_skip` sets it" in caplog.text


def test_another_clip_skip_is_said_once(anime, own, tmp_path, caplog):
    """It was said of the file, and again of the concept in it."""
    dataclasses.replace(anime, info=anime.info.model_copy(update={"name": "once"})).save(tmp_path / "x.safetensors")
    caplog.clear()
    concept._say.cache_clear()
    MixOfShowPipeline.single(own, tmp_path / "x.safetensors")
    assert caplog.text.count("made with clip skip") == 1


@pytest.mark.parametrize("given", [{}, {"clip_skip": 0}])
def test_the_concept_is_followed_unless_told_otherwise(anime, own, tmp_path, caplog, given):
    anime.save(tmp_path / "anime.concept.safetensors")
    own.save_pretrained(tmp_path / "base")
    caplog.clear()
    concept._say.cache_clear()
    drawn = open_pipeline(str(tmp_path / "base"), concepts=[tmp_path / "anime.concept.safetensors"], **given)
    assert text_encoders(drawn)[0].skipped == (0 if given else 1)
    assert ("made with clip skip" in caplog.text) == bool(given)
    job = make_job([tmp_path / "anime.concept.safetensors"], {}, base=str(tmp_path / "base"), **given)
    assert text_encoders(job.pipeline)[0].skipped == (0 if given else 1)


@pytest.mark.parametrize("given", [{}, {"clip_skip": 0}])
def test_a_list_of_concepts_is_followed_too(anime, own, tmp_path, caplog, given):
    anime.save(tmp_path / "ours.safetensors")
    own.save_pretrained(tmp_path / "base")
    listed = [{"lora_path": "anime.safetensors", "concept_name": "dog"}, {"lora_path": "ours.safetensors"}]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    caplog.clear()
    concept._say.cache_clear()
    job = make_job([tmp_path / "list.json"], {}, base=str(tmp_path / "base"), **given)
    assert text_encoders(job.pipeline)[0].skipped == (0 if given else 1)
    assert caplog.text.count("made with clip skip 1, this base has 0") == (1 if given else 0)  # of one name it is said once


def test_a_picture_of_another_layer_is_of_another_model(own):
    drawn = open_pipeline("emojiland")
    before = model_hash(drawn)
    skip_text_layers(drawn, 1)
    assert model_hash(drawn) != before


# ---- sisters


def test_a_concept_of_another_base_says_how_it_is_taken(golden_concepts, sister, tmp_path):
    golden_concepts[0].save(tmp_path / "dogx.safetensors")
    with pytest.raises(ConceptFileError, match=r"nothing was changed \(`allow_base` sister takes it all the same\)"):
        load_concept(tmp_path / "dogx.safetensors", load_base(sister))
    with pytest.raises(SettingsError, match="`allow_base`: expected sister, found 'brother'"):
        load_base(sister, allow_base="brother")


def test_a_sister_is_taken_and_the_result_says_so(golden_concepts, sister, tmp_path, caplog):
    golden_concepts[0].save(tmp_path / "dogx.safetensors")
    base = load_base(sister, allow_base="sister")
    taken = load_concept(tmp_path / "dogx.safetensors", base)
    assert "taken for realistic all the same" in caplog.text
    assert taken.hash == golden_concepts[0].hash
    assert (taken.info.base, taken.info.base_fingerprint) == ("realistic", fingerprint(base))
    assert taken.info.settings["made_for"] == f"golden ({golden_concepts[0].info.base_fingerprint})"
    taken.save(tmp_path / "dogx-realistic.safetensors")
    load_concept(tmp_path / "dogx-realistic.safetensors", load_base(sister))
    assert with_concept(base, golden_concepts[0]).concepts[0].info.settings["made_for"].startswith("golden")
    fused = fuse(golden_concepts, base, QUICK).model
    assert all(one.info.settings["made_for"].startswith("golden") for one in fused.concepts)
    fused.save(tmp_path / "fused")
    fused.save_delta(tmp_path / "delta.safetensors")
    draw_pictures(MixOfShowPipeline.of(fused), make_composition(ASKED), [tmp_path / "a.png"])
    for path in ("fused", "delta.safetensors"):
        saved = load_model(tmp_path / path, base=None if path == "fused" else sister)
        assert [one.made_for[:6] for one in saved.manifest.concepts] == ["golden", "golden"]
    assert [one[:6] for one in read_note(tmp_path / "a.png")[1].made_for.values()] == ["golden", "golden"]
    again = load_unfused(tmp_path / "fused", base=GOLDEN_BASE, allow_base="sister")
    assert [one.made_for[:6] for one in again.manifest.concepts] == ["golden", "golden"]
    write_fusion_report(tmp_path / "fused.html", fuse(golden_concepts, base, QUICK))
    assert "&lt;dogx&gt; was made for" in (tmp_path / "fused.html").read_text()
    assert open_concept(tmp_path / "dogx.safetensors", base).info.base == "realistic"


def test_another_shape_is_no_sister(golden_concepts, sister):
    base = load_base(sister, allow_base="sister")
    narrow = dataclasses.replace(golden_concepts[0], embeddings=golden_concepts[0].embeddings[..., :31])
    with pytest.raises(ConceptFileError, match="of width 32"):
        with_concept(base, narrow)


def test_a_call_leaves_out_layers_for_its_own_picture_only(own):
    pipe = MixOfShowPipeline.of(ConceptModel(own))
    how = {"num_inference_steps": 1, "seed": 0, "output_type": "latent", "width": 64, "height": 64}
    before, other, after = (pipe("a dog", clip_skip=skip, **how).images for skip in (None, 1, None))
    assert torch.equal(before, after)
    assert not torch.allclose(before, other)
    skip_text_layers(own, 1)
    assert torch.equal(pipe("a dog", **how).images, other)
