"""Laws of layer-wise prompts, and of everything that changes a model for a while."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from mixofshow.bases.layers import cross_attentions
from mixofshow.concepts.adapters import replaced
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import with_concept
from mixofshow.concepts.prompts import encode_ids, encode_prompts, layerwise, placeholder_vectors
from mixofshow.concepts.words import Vocabulary, token_ids
from mixofshow.sampling.attention import RegionText, regional
from mixofshow.sampling.regions import Shape


@pytest.mark.parametrize(
    "prompt",
    [
        "photo of a man near the beach",
        "",
        "   ",
        "Photo OF  a\tman,,near\nthe beach!",
        "a < b and 2 > 1",
        "<3",
        "<>",
        "été 写真 🙂",
        "best quality painting of a red castle " * 20,
    ],
)
@torch.no_grad()
def test_a_prompt_without_placeholders_is_read_as_ever(prompt, golden_pipeline, golden_concepts):
    (found,) = encode_prompts(golden_pipeline, [prompt], vocabulary(golden_concepts)).hidden
    ids = golden_pipeline.tokenizer(
        prompt, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    expected = golden_pipeline.text_encoder(ids).last_hidden_state
    assert len(found) == 16
    assert all(torch.equal(layer, expected[0]) for layer in found)


@torch.no_grad()
def test_prompts_do_not_depend_on_their_neighbours(golden_pipeline, golden_concepts, relative_error):
    known = vocabulary(golden_concepts)
    prompts = ["a <dogx1> <dogx2>", "a castle", "a <manx2>", "a <dogx1> <dogx2>"]
    together = encode_prompts(golden_pipeline, prompts, known).hidden
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, encode_prompts(golden_pipeline, [prompt], known).hidden[0])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a <dogx> here", "a <dogx1> <dogx2> here"),
        ("a <DOGX1> here", "a <dogx1> here"),
        ("a<dogx1>here", "a <dogx1> here"),
        ("<dogx1><dogx2>", "<dogx1> <dogx2>"),
    ],
)
def test_two_spellings_of_one_prompt(written, meant, golden_pipeline, golden_concepts):
    known = vocabulary(golden_concepts)
    assert token_ids(written, golden_pipeline.tokenizer, known, 654) == token_ids(
        meant, golden_pipeline.tokenizer, known, 654
    )


@pytest.mark.parametrize("prompt", ["a <dogx1> here", "a <dogx1> <dogx2>", "a <manx1> and <dogx1>", "a castle"])
@torch.no_grad()
def test_a_word_with_one_vector_is_the_same_in_all_layers(prompt, golden_pipeline, golden_concepts):
    known = vocabulary(golden_concepts)
    single = {word: vector[:1] if word.startswith("<dog") else vector for word, vector in known.embeddings.items()}
    repeated = {word: vector.expand(16, -1) for word, vector in single.items()}
    passed = []
    mlp = golden_pipeline.text_encoder.encoder.layers[0].mlp
    with mlp.register_forward_pre_hook(lambda module, args: passed.append(args[0].shape[:-1].numel())):
        found = encode_prompts(golden_pipeline, [prompt], Vocabulary(single, known.aliases)).hidden
    expected = encode_prompts(golden_pipeline, [prompt], Vocabulary(repeated, known.aliases)).hidden
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (passed == [77]) == ("<man" not in prompt)


def test_gradients_reach_the_vectors_of_used_words_only(golden_pipeline, golden_concepts):
    known = vocabulary(golden_concepts)
    vectors = known.vectors(16).clone().requires_grad_()
    ids = torch.tensor([token_ids("a <dogx2>", golden_pipeline.tokenizer, known, 654)])
    encode_ids(golden_pipeline.text_encoder, ids, vectors).read.square().sum().backward()
    assert vectors.grad.norm(dim=-1).gt(0).any(0).tolist() == [False, True, False, False]
    assert vectors.grad.norm(dim=-1)[:, 1].gt(0).all()


@torch.no_grad()
def test_equal_slices_are_plain_text(golden, golden_pipeline):
    unet, latents = golden_pipeline.unet, golden("b_unet")["latents_sq"]
    text = golden("a_text")["plain.embeds"][:1]
    plain = unet(latents, 500, text).sample
    with layerwise(unet):
        assert torch.equal(unet(latents, 500, text[:, None].expand(-1, 16, -1, -1)).sample, plain)
        assert torch.equal(unet(latents, 500, text).sample, plain)


@pytest.mark.parametrize("layer", [0, 6, 15])
@torch.no_grad()
def test_each_layer_reads_its_own_slice(layer, golden, golden_pipeline):
    unet, latents = golden_pipeline.unet, golden("b_unet")["latents_sq"]
    text = golden("a_text")["embeds_alpha0.7_prompt1"]
    read = []
    attention = list(cross_attentions(unet).values())[layer]
    with ExitStack() as stack:
        stack.enter_context(layerwise(unet))
        handle = attention.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        stack.callback(handle.remove)
        unet(latents, 500, text)
    assert len(read) == 1
    assert torch.equal(read[0], text[:, layer])


def _regional(pipeline, concept):
    text = torch.zeros(1, 16, 77, 32)
    region = RegionText(Shape(box=(0, 0, 0.5, 0.5)), text)
    return regional(pipeline.unet, text, [region], batch=1, columns=16, rows=16, isolate=1)


CHANGES = {
    "layerwise": lambda pipeline, concept: layerwise(pipeline.unet),
    "regional": _regional,
    "a concept": lambda pipeline, concept: with_concept(pipeline, concept).active(),
    "a concept at half strength": lambda pipeline, concept: with_concept(pipeline, concept, 0.5).active(),
    "placeholder_vectors": lambda pipeline, concept: placeholder_vectors(
        pipeline.text_encoder, concept.embeddings.flatten(0, 1)
    ),
}


def state(pipeline):
    """All that a change could leave behind: weights, modules, processors, hooks."""
    parts = (pipeline.unet, pipeline.text_encoder)
    weights = {name: tensor.clone() for part in parts for name, tensor in part.state_dict().items()}
    modules = [
        (name, module, len(module._forward_pre_hooks), getattr(module, "processor", None))
        for part in parts
        for name, module in part.named_modules()
    ]
    return weights, modules


def same(one, other):
    return (
        one[1] == other[1]
        and one[0].keys() == other[0].keys()
        and all(torch.equal(one[0][k], other[0][k]) for k in one[0])
    )


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("failing", [False, True])
def test_leaving_restores_the_model(change, failing, golden_pipeline, golden_concepts):
    before = state(golden_pipeline)
    try:
        with CHANGES[change](golden_pipeline, golden_concepts[0]):
            assert not same(before, state(golden_pipeline))
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert failing
    assert same(before, state(golden_pipeline))


def test_a_change_that_fails_halfway_is_undone(golden_pipeline, golden_concepts):
    before = state(golden_pipeline)
    first, second = list(golden_concepts[0].deltas)[:2]
    with (
        pytest.raises(RuntimeError),
        replaced(golden_pipeline, {first: torch.zeros(32, 32), second: torch.zeros(5, 7)}),
    ):
        pass
    assert same(before, state(golden_pipeline))
