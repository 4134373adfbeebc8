"""Layer-wise prompt encoding (Mix-of-Show §3.2, after P+): each cross-attention layer reads its own variant of a prompt.

A placeholder word has one vector per cross-attention layer (or group of layers, see `text_groups`), so a prompt with
placeholders is encoded once per layer; the result is `(prompts, layers, tokens, dim)`. Inside `layerwise(unet)` the
UNet takes such a tensor as its `encoder_hidden_states` and hands each layer its own slice.

Where a base has several text encoders, a word's vector is that of all of them, one after the other, and so is the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mixofshow.bases.families import of_encoders, text_encoders
from mixofshow.bases.layers import count_groups, cross_attentions, text_groups
from mixofshow.bases.parts import runs_on
from mixofshow.concepts.encoding import Encode, States, encode_fully, encode_shared
from mixofshow.concepts.words import Vocabulary, token_ids, token_weights
from mixofshow.errors import SettingsError, shown

Ids = tuple[Tensor, ...]
"""Token ids of some prompts for each text encoder, (prompts, tokens)."""


@dataclass(frozen=True)
class EncodedText:
    """Prompts as the UNet is told them: `hidden` (prompts, layers, tokens, dim), and `pooled` (prompts, dim) or None.

    A prompt has one pooled vector for all layers: the mean over its variants.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    def for_layers(self, layers: int) -> EncodedText:
        """The same where one variant serves all layers."""
        return EncodedText(self.hidden.expand(-1, layers, -1, -1), self.pooled)

    def zeros(self) -> EncodedText:
        """Zeros of the same shapes."""
        return EncodedText(
            torch.zeros_like(self.hidden), None if self.pooled is None else torch.zeros_like(self.pooled)
        )


def joined(texts: Sequence[EncodedText]) -> EncodedText:
    """Several prompts behind one another."""
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return EncodedText(torch.cat([text.hidden for text in texts]), torch.cat(pooled) if pooled else None)


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


def encode_ids(
    text_encoder: Any, ids: Tensor, vectors: Tensor, *, skipped: int = 0, encode: Encode = encode_shared
) -> States:
    """Encode token ids in every layer's variant. (prompts, tokens), (layers, words, dim) -> (prompts, layers, tokens, dim).

    What variants or prompts share is encoded once; to record every token of each, pass `encode_fully`.
    """
    layers, words, _ = vectors.shape
    first = text_encoder.get_input_embeddings().num_embeddings
    # Each layer's variant of a word has an id of its own, so that rows alike in ids are alike in vectors.
    offsets = words * torch.arange(layers, device=ids.device)[:, None, None]
    variants = rearrange(ids + offsets * (ids >= first), "layers prompts tokens -> (layers prompts) tokens")
    with placeholder_vectors(text_encoder, vectors.flatten(0, 1)):
        states = encode(text_encoder, variants, skipped)
    read, last = (
        rearrange(one, "(layers prompts) tokens dim -> prompts layers tokens dim", layers=layers)
        for one in (states.read, states.last)
    )
    return States(read, last)


def encode_variants(pipeline: Any, ids: Ids, vectors: Tensor, *, encode: Encode = encode_shared) -> EncodedText:
    """Prompts through all text encoders, in a variant for each of the words' vectors, (layers, words, dim)."""
    parts = zip(text_encoders(pipeline), ids, of_encoders(pipeline, vectors), strict=True)
    return _told(
        pipeline,
        ids,
        [encode_ids(one.model, own, part, skipped=one.skipped, encode=encode) for one, own, part in parts],
    )


def encode_plain(pipeline: Any, ids: Ids) -> EncodedText:
    """Prompts without placeholders, all in one variant: `hidden` is (prompts, 1, tokens, dim)."""
    found = (encode_fully(one.model, own, one.skipped) for one, own in zip(text_encoders(pipeline), ids, strict=True))
    return _told(pipeline, ids, [States(states.read[:, None], states.last[:, None]) for states in found])


def _told(pipeline: Any, ids: Ids, states: Sequence[States]) -> EncodedText:
    """What all encoders say, side by side; pooled is the state of the end token where an encoder has a projection."""
    pooled = None
    for encoder, own, of_one in zip(text_encoders(pipeline), ids, states, strict=True):
        if (projection := getattr(encoder.model, "text_projection", None)) is not None:
            # Found by its id: transformers looks for the largest one, which here is a placeholder's.
            end = (own == encoder.tokenizer.eos_token_id).int().argmax(-1)
            pooled = projection(of_one.last[torch.arange(len(end), device=end.device), :, end].mean(1))
    read = [one.as_read(of_one.read) for one, of_one in zip(text_encoders(pipeline), states, strict=True)]
    return EncodedText(torch.cat(read, dim=-1), pooled)


def prompt_ids(
    pipeline: Any, prompts: Sequence[str], vocabulary: Vocabulary, *, padded: bool = True, quiet: bool = False
) -> Ids:
    """Token ids of prompts, with the vocabulary's words behind those of each text encoder. Raises TokenError.

    Words that are cut off are named in a warning, unless `quiet`.
    """
    return tuple(
        torch.tensor(
            [
                token_ids(prompt, one.tokenizer, vocabulary, one.first_id, one.length if padded else None, quiet=quiet)
                for prompt in prompts
            ],
            device=runs_on(one.model),
        )
        for one in text_encoders(pipeline)
    )


def encode_prompts(pipeline: Any, prompts: Sequence[str], vocabulary: Vocabulary) -> EncodedText:
    """Encode prompts layer by layer, padded to the text encoders' length: `hidden` is (prompts, layers, tokens, dim).

    Prompts without placeholders are the same for all layers and are encoded once; so are those whose words have one
    vector for all layers, and repeated prompts. Weights, where the vocabulary's syntax has them, are applied. Raises
    TokenError for unknown words, SettingsError for weights that cannot be applied.
    """
    layers = count_groups(pipeline.unet)
    encoded: dict[str, EncodedText] = {}
    for prompt in dict.fromkeys(prompts):  # one by one, so that no prompt's last bit depends on its neighbours
        ids = prompt_ids(pipeline, [prompt], vocabulary)
        first = text_encoders(pipeline)[0].first_id
        rows = enumerate(vocabulary.embeddings.values(), start=first)
        if used := [vector for row, vector in rows if (ids[0] == row).any()]:
            variants = max(len(vector) for vector in used)
            text = encode_variants(pipeline, ids, vocabulary.vectors(layers)[:variants])
        else:
            text = encode_plain(pipeline, ids)
        encoded[prompt] = _weighted(pipeline, prompt, vocabulary, text).for_layers(layers)
    return joined([encoded[prompt] for prompt in prompts])


def _weighted(pipeline: Any, prompt: str, vocabulary: Vocabulary, text: EncodedText) -> EncodedText:
    """The prompt's text with the weights of its words, for each text encoder by itself; without any, as it is."""
    if all(weight == 1 for _, weight in vocabulary.pieces(prompt)):
        return text
    parts = []
    for one, states in zip(text_encoders(pipeline), of_encoders(pipeline, text.hidden), strict=True):
        weights = states.new_tensor(token_weights(prompt, one.tokenizer, vocabulary, one.length))
        parts.append(emphasized(states, weights))
    if not all(part.isfinite().all() for part in parts):
        raise SettingsError(
            f"prompt weights: the states of '{shown(prompt)}' come to a mean of 0, which cannot be made what it was; "
            "change a weight"
        )
    return EncodedText(torch.cat(parts, dim=-1), text.pooled)


def emphasized(states: Tensor, weights: Tensor) -> Tensor:
    """States times their tokens' weights, with the mean that they had, as A1111 does. (..., tokens, dim), (tokens,).

    Not finite where the mean came to 0. One that was 0 from the start, as a norm without bias leaves it, stays as it is.
    """
    heavier = states * weights[:, None]
    nothing = torch.finfo(states.dtype).eps * states.float().abs().mean((-2, -1), keepdim=True)
    before, after = (one.float().mean((-2, -1), keepdim=True) for one in (states, heavier))
    factor = torch.where(after.abs() > nothing, before / after, torch.inf)
    return heavier * torch.where(before.abs() > nothing, factor, 1.0).to(states.dtype)


def unprompted(pipeline: Any, prompt: str, encoded: EncodedText) -> EncodedText:
    """What guidance reads as the negative `prompt`: zeros if there is none and the base was trained so, as SDXL."""
    return encoded.zeros() if not prompt and pipeline.config.get("force_zeros_for_empty_prompt", False) else encoded


@contextlib.contextmanager
def layerwise(unet: Any) -> Iterator[None]:
    """Inside, the UNet accepts 4-D text, (batch, layers, tokens, dim); a cross-attention layer reads its group's."""

    def pick(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            text = kwargs.get("encoder_hidden_states")
            if text is not None and text.ndim == 4:
                kwargs = {**kwargs, "encoder_hidden_states": text[:, index]}
            return args, kwargs

        return hook

    handles = [
        module.register_forward_pre_hook(pick(group), with_kwargs=True)
        for group, module in zip(text_groups(unet).values(), cross_attentions(unet).values(), strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
