"""Passing many similar prompts through a CLIP text encoder, each distinct beginning of them only once.

Attention is causal: what the encoder makes of a token depends on the tokens up to it and on nothing else. So rows
that begin alike share the states of what they share, as a tree: a node is a distinct beginning of some row. The
encoder works on the nodes, one token each; only attention sees them in rows. All of it is exact, gradients included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface


@dataclass(frozen=True)
class States:
    """What a text encoder makes of token ids, each (rows, tokens, dim): what the UNet reads of it, and its last states."""

    read: Tensor
    last: Tensor


Encode = Callable[[Any, Tensor, int], States]
"""A text encoder, token ids, (rows, tokens), and how many of its last layers the UNet's text leaves out."""


def encode_fully(text_encoder: Any, rows: Tensor, skipped: int = 0) -> States:
    """Every token of every row: for recording what the encoder's layers see. (rows, tokens) -> (rows, tokens, dim)."""
    return _states(text_encoder(rows, output_hidden_states=skipped > 0), skipped)


def encode_shared(text_encoder: Any, rows: Tensor, skipped: int = 0) -> States:
    """The same numbers, with every distinct beginning of a row encoded once. (rows, tokens) -> (rows, tokens, dim)."""
    distinct, place = rows.unique(dim=0, return_inverse=True)
    if any(getattr(module, "gradient_checkpointing", False) for module in text_encoder.modules()):
        # The backward pass will run the layers again, outside our `with`: by then they must need no help from us.
        return _mapped(encode_fully(text_encoder, distinct, skipped), lambda states: states[place])
    nodes, origins = _beginnings(distinct)
    with _attention_in_rows(text_encoder):
        output = text_encoder(
            distinct.flatten()[origins, None],
            position_ids=(origins % rows.shape[1])[:, None],
            output_hidden_states=skipped > 0,
            nodes=nodes,
            origins=origins,
        )
    return _mapped(_states(output, skipped), lambda states: F.embedding(nodes[place], states.flatten(1)))


def _states(output: Any, skipped: int) -> States:
    """The last states have passed the final norm; those of layers before it have not."""
    last = output.last_hidden_state
    return States(output.hidden_states[-1 - skipped] if skipped else last, last)


def _mapped(states: States, function: Callable[[Tensor], Tensor]) -> States:
    last = function(states.last)
    return States(last if states.read is states.last else function(states.read), last)


def _beginnings(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct beginnings of rows: the node at each place, (rows, tokens), and each node's first place.

    A place is counted through all rows, as in `rows.flatten()`: (nodes,).
    """
    alike = (rows[:, None] == rows).cumprod(
        -1, dtype=torch.uint8
    )  # (rows, rows, tokens): do two rows agree up to here?
    owner = alike.argmax(1)  # the first row that begins like this one
    places = owner * rows.shape[1] + torch.arange(rows.shape[1], device=rows.device)
    origins, nodes = places.unique(return_inverse=True)
    return nodes, origins


def _attend_in_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    nodes: Tensor,
    origins: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of nodes, (nodes, heads, 1, dim), along the rows that they form. -> (nodes, 1, heads, dim)."""

    def in_rows(states: Tensor) -> Tensor:
        # An embedding lookup is indexing whose gradient is quick, and the same on every run.
        found = F.embedding(nodes, states.flatten(1))
        return rearrange(found, "rows tokens (heads dim) -> rows heads tokens dim", heads=states.shape[1])

    # On a CPU, PyTorch's fused attention takes four times as long there and back on rows so short.
    slow = query.requires_grad and query.device.type == "cpu"
    attend = _attend_spelled_out if slow else partial(F.scaled_dot_product_attention, is_causal=True)
    seen = attend(in_rows(query), in_rows(key), in_rows(value), scale=scaling, dropout_p=dropout)
    return rearrange(seen, "rows heads tokens dim -> (rows tokens) 1 heads dim")[origins], None


def _attend_spelled_out(query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout_p: float) -> Tensor:
    """Causal attention, (rows, heads, tokens, dim), its softmax in single precision or better."""
    tokens = query.shape[-2]
    later = torch.full((tokens, tokens), float("-inf"), device=query.device).triu(1)
    weights = (query @ key.mT * scale + later).softmax(-1).to(query.dtype)
    return F.dropout(weights, dropout_p) @ value


_NAME: Final = "mixofshow_rows"
AttentionInterface.register(_NAME, _attend_in_rows)


@contextlib.contextmanager
def _attention_in_rows(text_encoder: Any) -> Iterator[None]:
    """Inside, the text encoder takes `nodes` and `origins` and attends along the rows that they describe."""
    config = getattr(text_encoder, "text_model", text_encoder).config  # one with a projection has a copy of its own
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
