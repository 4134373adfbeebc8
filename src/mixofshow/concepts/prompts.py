"""Layer-wise prompt encoding (Mix-of-Show §3.2, after P+): each cross-attention layer reads its own variant of a prompt.

A placeholder word has one vector per cross-attention layer, so a prompt with placeholders is encoded once per
layer; the result is `(prompts, layers, tokens, dim)`. Inside `layerwise(unet)` the UNet takes such a tensor as its
`encoder_hidden_states` and hands each layer its own slice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mixofshow.bases.layers import cross_attentions
from mixofshow.concepts.encoding import Encode, encode_shared
from mixofshow.concepts.words import Vocabulary, token_ids


class _WordTable(nn.Module):
    """Token embeddings that also know the placeholder words. Ids (rows, tokens) -> vectors (rows, tokens, dim)."""

    def __init__(self, table: nn.Embedding, vectors: Tensor) -> None:
        super().__init__()
        self.table = table
        self.vectors = vectors  # (words, dim); a plain attribute, so that gradients reach its owner

    def forward(self, ids: Tensor) -> Tensor:
        first = self.table.num_embeddings
        plain = self.table(ids.clamp(max=first - 1))
        words = F.embedding((ids - first).clamp(min=0), self.vectors.to(plain.device, plain.dtype))
        return torch.where((ids >= first)[..., None], words, plain)


@contextlib.contextmanager
def placeholder_vectors(text_encoder: Any, vectors: Tensor) -> Iterator[None]:
    """Inside, ids beyond the vocabulary stand for these vectors, (words, dim)."""
    table = text_encoder.get_input_embeddings()
    text_encoder.set_input_embeddings(_WordTable(table, vectors))
    try:
        yield
    finally:
        text_encoder.set_input_embeddings(table)


def encode_ids(text_encoder: Any, ids: Tensor, vectors: Tensor, *, encode: Encode = encode_shared) -> Tensor:
    """Encode token ids in every layer's variant. (prompts, tokens), (layers, words, dim) -> (prompts, layers, tokens, dim).

    What variants or prompts share is encoded once; to record every token of each, pass `encode_fully`.
    """
    layers, words, _ = vectors.shape
    first = text_encoder.get_input_embeddings().num_embeddings
    # Each layer's variant of a word has an id of its own, so that rows alike in ids are alike in vectors.
    offsets = words * torch.arange(layers, device=ids.device)[:, None, None]
    variants = rearrange(ids + offsets * (ids >= first), "layers prompts tokens -> (layers prompts) tokens")
    with placeholder_vectors(text_encoder, vectors.flatten(0, 1)):
        hidden = encode(text_encoder, variants)
    return rearrange(hidden, "(layers prompts) tokens dim -> prompts layers tokens dim", layers=layers)


def encode_prompts(pipeline: Any, prompts: Sequence[str], vocabulary: Vocabulary) -> Tensor:
    """Encode prompts layer by layer, padded to the text encoder's length: (prompts, layers, tokens, dim).

    Prompts without placeholders are the same for all layers and are encoded once; so are those whose words have one
    vector for all layers, and repeated prompts. Raises TokenError for unknown words.
    """
    text_encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    layers = len(cross_attentions(pipeline.unet))
    first = text_encoder.get_input_embeddings().num_embeddings
    length = text_encoder.config.max_position_embeddings
    encoded: dict[str, Tensor] = {}
    for prompt in dict.fromkeys(prompts):  # one by one, so that no prompt's last bit depends on its neighbours
        ids = torch.tensor([token_ids(prompt, tokenizer, vocabulary, first, length)], device=text_encoder.device)
        used = [vector for row, vector in enumerate(vocabulary.embeddings.values(), start=first) if (ids == row).any()]
        if used:
            variants = max(len(vector) for vector in used)
            (hidden,) = encode_ids(text_encoder, ids, vocabulary.vectors(layers)[:variants])
        else:
            hidden = text_encoder(ids).last_hidden_state
        encoded[prompt] = hidden.expand(layers, -1, -1)
    return torch.stack([encoded[prompt] for prompt in prompts])


@contextlib.contextmanager
def layerwise(unet: Any) -> Iterator[None]:
    """Inside, the UNet accepts 4-D text, (batch, layers, tokens, dim), and cross-attention layer k reads slice k."""

    def pick(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            text = kwargs.get("encoder_hidden_states")
            if text is not None and text.ndim == 4:
                kwargs = {**kwargs, "encoder_hidden_states": text[:, index]}
            return args, kwargs

        return hook

    handles = [
        module.register_forward_pre_hook(pick(index), with_kwargs=True)
        for index, module in enumerate(cross_attentions(unet).values())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
