"""What each tuning method trains, as a table; the training loop knows nothing of it.

method             words                     vectors    weights
ed-lora            random, class word        per layer  LoRA in text encoder and UNet    Mix-of-Show §3.2
lora               random, class word        one        LoRA in text encoder and UNet    Hu et al. 2021
p-plus             class word                per layer  none                             P+, Voynov et al. 2023
textual-inversion  class word                one        none                             Gal et al. 2022
custom-diffusion   random, fixed class word  one        keys, values of cross-attention  Kumari et al. 2023
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from einops import repeat
from torch import Tensor, nn

from mixofshow.bases.families import text_encoders, token_width
from mixofshow.bases.layers import count_groups
from mixofshow.errors import TokenError, shown
from mixofshow.tuning.changes import Changes, full_keys_and_values, low_rank_layers
from mixofshow.tuning.settings import TuningSettings

Start = Literal["random", "class"]


@dataclass(frozen=True)
class Method:
    """The concept's words by how they start, how many of them (the first) move, and what else is trained."""

    starts: tuple[Start, ...]
    layerwise: bool
    changes: Callable[[Any, TuningSettings], AbstractContextManager[Changes]]
    moving: int | None = None


@contextlib.contextmanager
def _words_only(pipeline: Any, settings: TuningSettings) -> Iterator[Changes]:
    yield {}


METHODS: Final = {
    "ed-lora": Method(("random", "class"), True, low_rank_layers),
    "lora": Method(("random", "class"), False, low_rank_layers),
    "p-plus": Method(("class",), True, _words_only),
    "textual-inversion": Method(("class",), False, _words_only),
    "custom-diffusion": Method(("random", "class"), False, full_keys_and_values, moving=1),
}


def word_names(settings: TuningSettings) -> tuple[str, ...]:
    """The concept's words: `<name>` alone, or `<name1> <name2>`, for which `<name>` then stands."""
    count = len(METHODS[settings.method].starts)
    if count == 1:
        return (settings.placeholder,)
    return tuple(f"<{settings.name}{number}>" for number in range(1, count + 1))


def initializers(settings: TuningSettings) -> tuple[str, ...]:
    """What each word starts as: "random" or the class word."""
    return tuple(settings.class_word if start == "class" else start for start in METHODS[settings.method].starts)


def class_vector(pipeline: Any, class_word: str) -> Tensor:
    """The base's own vector of the class word, (dim,), of all text encoders together. Raises TokenError."""
    encoders = text_encoders(pipeline)
    return torch.cat([one.table[class_token(one.tokenizer, class_word)].detach().float() for one in encoders])


def class_token(tokenizer: Any, class_word: str) -> int:
    """The token id of the class word; of several tokens the last, as "officer" of "police officer". Raises TokenError."""
    ids = tokenizer(class_word, add_special_tokens=False).input_ids
    if not ids or ids[-1] in (tokenizer.eos_token_id, tokenizer.unk_token_id):
        raise TokenError(f"class word '{shown(class_word)}' means nothing to this base model; choose a word it knows")
    return int(ids[-1])


class Words(nn.Module):
    """The vectors of the concept's words; calling it gives all of them, (layers or 1, words, dim)."""

    def __init__(self, vectors: Tensor, moving: int) -> None:
        super().__init__()
        self.moving = nn.Parameter(vectors[:, :moving].clone())
        self.register_buffer("fixed", vectors[:, moving:].clone())

    def forward(self) -> Tensor:
        """(layers or 1, words, dim)."""
        return torch.cat([self.moving, self.fixed], dim=1)  # type: ignore[list-item]


def initial_words(pipeline: Any, settings: TuningSettings, generator: torch.Generator) -> Words:
    """The words as they start, equal in all layers."""
    method = METHODS[settings.method]
    known = class_vector(pipeline, settings.class_word)
    starts = [
        settings.words.sigma * torch.randn(token_width(pipeline), generator=generator).to(known)
        if start == "random"
        else known
        for start in method.starts
    ]
    layers = count_groups(pipeline.unet) if method.layerwise else 1
    vectors = repeat(torch.stack(starts), "words dim -> layers words dim", layers=layers)
    return Words(vectors, len(starts) if method.moving is None else method.moving)
