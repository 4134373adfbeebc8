"""Laws of encoding in layers: sharing what prompts have in common changes no number and no gradient, only the work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mixofshow.concepts.encoding import encode_fully, encode_shared
from mixofshow.concepts.prompts import encode_ids

VOCABULARY, TOKENS, WIDTH, LAYERS = 20, 8, 16, 4
V1, V2, END = VOCABULARY, VOCABULARY + 1, VOCABULARY - 1

PROMPTS = {
    "placeholders first": [[V1, V2, 3, 4, 5, 6, 7, END]],
    "placeholder last": [[0, 1, 2, 3, 4, 5, 6, V2]],
    "several, repeated": [[0, V1, 2, V1, V2, 5, V1, END]],
    "none": [[0, 1, 2, 3, 4, 5, 6, END]],
    "with and without": [[0, 1, V1, 3, END, END, END, END], [0, 1, 2, 3, END, END, END, END]],
    "one prompt twice": [[0, 1, V1, 3, END, END, END, END]] * 2,
    "beginnings in common": [[0, 1, V1, V2, 4, 5, 6, END], [0, 1, V1, V2, 4, 7, 8, END], [0, 1, 9, V2, 4, 5, 6, END]],
    "nothing in common": [[0, 1, V1, 3, 4, 5, 6, END], [2, 1, V1, 3, 4, 5, 6, END]],
}


def text_encoder(dtype=torch.float64, attention="sdpa", kind=CLIPTextModel):
    """A tiny text encoder with LoRA that changes something, all in training."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=END,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = kind(config).requires_grad_(False).to(dtype)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
    model = inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False), model
    )
    return model.to(dtype).train()


def word_vectors(layers=LAYERS, dtype=torch.float64):
    return torch.randn(layers, 2, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def ours(model, ids, vectors):
    return encode_ids(model, ids, vectors).read


def one_by_one(model, ids, vectors):
    """The plain way: layer after layer, each with a table of its own."""
    table = model.get_input_embeddings().weight
    layers = [
        torch.func.functional_call(
            model, {"embeddings.token_embedding.weight": torch.cat([table, words])}, (ids,)
        ).last_hidden_state
        for words in vectors
    ]
    return torch.stack(layers, 1)


def results(model, encode, ids, vectors):
    """The encoded prompts, the gradient of the words, and the gradients of all weights in one row."""
    vectors.grad = None
    model.zero_grad()
    hidden = encode(model, ids, vectors)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden)
    (hidden * weight).sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])
    return hidden.detach(), vectors.grad, gradients


def distances(found, expected):
    """Of each tensor, the norm of the difference over the norm of what was expected."""
    assert [one.shape for one in found] == [one.shape for one in expected]
    pairs = zip(found, expected, strict=True)
    return [float((one - other).double().norm() / other.double().norm().clamp(min=1e-30)) for one, other in pairs]


def require_same(found, expected, tolerance):
    assert max(distances(found, expected)) < tolerance


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("layers", [1, LAYERS])
@pytest.mark.parametrize(
    ("dtype", "attention", "tolerance"),
    # Eager attention works in single precision even when all else is double.
    [
        (torch.float64, "sdpa", 1e-10),
        (torch.float64, "eager", 1e-5),
        (torch.float32, "sdpa", 1e-5),
        (torch.float32, "eager", 1e-5),
    ],
)
def test_sharing_changes_no_number_and_no_gradient(prompts, layers, dtype, attention, tolerance):
    model, ids, vectors = text_encoder(dtype, attention), torch.tensor(PROMPTS[prompts]), word_vectors(layers, dtype)
    found = results(model, ours, ids, vectors)
    assert found[0].shape == (len(ids), layers, TOKENS, WIDTH)
    require_same(found, results(model, one_by_one, ids, vectors), tolerance)


some_prompts = st.lists(
    st.lists(st.sampled_from([0, 1, V1, V2]), min_size=TOKENS, max_size=TOKENS), min_size=1, max_size=4
)


@given(prompts=some_prompts, layers=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_wherever_placeholders_stand(prompts, layers):
    model, ids, vectors = text_encoder(), torch.tensor(prompts), word_vectors(layers)
    require_same(results(model, ours, ids, vectors), results(model, one_by_one, ids, vectors), 1e-10)


@given(prompts=some_prompts, layers=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_each_distinct_beginning_is_encoded_once(prompts, layers):
    model, passed = text_encoder(), []
    for layer in model.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: passed.append(args[0].shape[:-1].numel()))
    encode_ids(model, torch.tensor(prompts), word_vectors(layers))
    rows = [
        [(token, layer if token >= VOCABULARY else 0) for token in prompt]
        for prompt in prompts
        for layer in range(layers)
    ]
    beginnings = {tuple(row[: end + 1]) for row in rows for end in range(TOKENS)}
    assert passed == [len(beginnings)] * 3


def test_encoding_fully_passes_every_token_of_every_layer():
    model, passed = text_encoder(), []
    model.encoder.layers[0].mlp.register_forward_pre_hook(lambda module, args: passed.append(args[0].shape[:-1]))
    ids, vectors = torch.tensor(PROMPTS["one prompt twice"]), word_vectors()
    full = encode_ids(model, ids, vectors, encode=encode_fully)
    assert passed == [(2 * LAYERS, TOKENS)]
    torch.testing.assert_close(full.read, ours(model, ids, vectors), atol=1e-10, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_with_gradient_checkpointing(reentrant, prompts):
    model, ids, vectors = text_encoder(), torch.tensor(PROMPTS[prompts]), word_vectors()
    expected = results(model, one_by_one, ids, vectors)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    require_same(results(model, ours, ids, vectors), expected, 1e-10)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_under_autocast(prompts):
    model, ids, vectors = text_encoder(torch.float32), torch.tensor(PROMPTS[prompts]), word_vectors(dtype=torch.float32)
    exact = results(model, one_by_one, ids, vectors)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (results(model, encode, ids, vectors) for encode in (ours, one_by_one))
    assert [one.dtype for one in found] == [one.dtype for one in plain]
    # Sums are rounded in another order, so only the errors compare.
    assert sum(distances(found, exact)) < 1.5 * sum(distances(plain, exact))


@pytest.mark.parametrize("encode", [encode_fully, encode_shared])
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_states_of_an_encoder_with_a_projection_before_its_last_layers(encode, skipped):
    ids = torch.tensor([[0, 1, 3, 4, END, END, END, END], [0, 1, 3, 5, 6, END, END, END]])
    encoder = text_encoder(kind=CLIPTextModelWithProjection)
    found, plain = encode(encoder, ids, skipped), encoder(ids, output_hidden_states=True)
    expected = plain.hidden_states[-1 - skipped] if skipped else plain.last_hidden_state
    torch.testing.assert_close(found.read, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.last, plain.last_hidden_state, atol=1e-10, rtol=0)


def test_leaving_restores_the_attention_even_after_an_error():
    model, ids, vectors = text_encoder(attention="eager"), torch.tensor(PROMPTS["none"]), word_vectors()
    table, inside = model.get_input_embeddings(), []
    encode_ids(model, ids, vectors)
    assert model.config._attn_implementation == "eager"

    def fail(*_):
        inside.append(model.config._attn_implementation)
        raise KeyboardInterrupt

    model.encoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        encode_ids(model, ids, vectors)
    assert inside != ["eager"]
    assert model.config._attn_implementation == "eager"
    assert model.get_input_embeddings() is table
