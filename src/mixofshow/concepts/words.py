"""Placeholder words: which prompts may use, and where they stand in a prompt.

The tokenizer is never changed. A prompt is split at its `<words>`; the rest is tokenized as ever, and each
placeholder becomes an id beyond the tokenizer's own. So no placeholder can change how any other text is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.concepts.syntax import ANY_WORD, Pieces, Syntax, read_prompt, require_brackets
from mixofshow.errors import TokenError, nearest, shown

logger = logging.getLogger(__name__)

WORD: Final = re.compile(r"<[a-z0-9][a-z0-9_-]{0,31}>")


def check_word(word: str) -> str:
    """The word itself, or TokenError unless it is of the form `<name>` in lower case."""
    if not WORD.fullmatch(word):
        raise TokenError(
            f"'{shown(word)}' cannot be a placeholder: it must look like <name>, in angle brackets, "
            "with at most 32 lower-case letters, digits, '-' or '_', so that it is no ordinary word"
        )
    return word


@dataclass(frozen=True)
class Vocabulary:
    """The placeholder words that prompts may use, and the syntax in which prompts are read.

    `embeddings` maps each word to its vectors, (layers, dim), where dim is that of all text encoders together;
    `aliases` maps a short word to several of them, as `<cat>` to `<cat1> <cat2>`.
    """

    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    syntax: Syntax = "plain"

    def pieces(self, prompt: str) -> Pieces:
        """The prompt as plain texts and placeholder words, in order, with their weights; marks of the syntax are gone.

        Raises TokenError for an unknown word, or for weights beyond sense.
        """
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise TokenError(f"the prompt is not valid Unicode text: '{shown(prompt)}'")
        read = read_prompt(prompt, self.syntax)
        return [(piece, weight) for text, weight in read for piece in self._split(text)]

    def split(self, prompt: str) -> list[str]:
        """The prompt as plain texts and placeholder words, in order. Raises TokenError as `pieces`."""
        return [piece for piece, _ in self.pieces(prompt)]

    def _split(self, text: str) -> list[str]:
        pieces: list[str] = []
        position = 0
        for match in ANY_WORD.finditer(text):
            pieces.append(text[position : match.start()])
            pieces.extend(self._words(match.group()))
            position = match.end()
        require_brackets(text, [*self.aliases, *self.embeddings])
        return [piece for piece in (*pieces, text[position:]) if piece.strip()]

    def _words(self, word: str) -> tuple[str, ...]:
        word = word.lower()
        if word in self.aliases:
            return self.aliases[word]
        if word in self.embeddings:
            return (word,)
        known = [*self.aliases, *self.embeddings]
        if given := [one for part in word[1:-1].split(":") if (one := f"<{part}>") in known]:
            raise TokenError(
                f"'{shown(word)}' in the prompt: write {given[0]}; with a weight, ({given[0]}:1.2), where `prompt_syntax` is a1111"
            )
        if ":" in word:  # as a web UI loads a LoRA
            raise TokenError(
                f"'{shown(word)}' in the prompt loads nothing here; `mixofshow convert` makes a LoRA a concept"
            )
        none = "; no concept is loaded: give its file as `concept`, or a fused `model`"
        hint = nearest(word, known) or (f"; known are {', '.join(known)}" if known else none)
        raise TokenError(f"unknown concept '{shown(word)}' in the prompt{hint}")

    def shortened(self, prompt: str) -> str:
        """The prompt with each alias in the place of the words that it stands for, as people write it; it reads the same."""
        for alias, words in self.aliases.items():
            prompt = prompt.replace(" ".join(words), alias)
        return prompt

    def without(self, words: Iterable[str]) -> Vocabulary:
        """The vocabulary less some words."""
        gone = set(words)
        return replace(
            self,
            embeddings={word: vector for word, vector in self.embeddings.items() if word not in gone},
            aliases={alias: parts for alias, parts in self.aliases.items() if not gone.intersection(parts)},
        )

    def vectors(self, layers: int) -> Tensor:
        """All words' vectors for looking up by row, (layers, words, dim); words in their own order."""
        # A folder's are on its device already, those of concepts that are loaded beside it are not.
        vectors = list(self.embeddings.values())
        return torch.stack([one.to(vectors[0].device).expand(layers, -1) for one in vectors], dim=1)


def token_ids(
    prompt: str,
    tokenizer: Any,
    vocabulary: Vocabulary,
    first_id: int,
    length: int | None = None,
    *,
    quiet: bool = False,
) -> list[int]:
    """Token ids of a prompt with start and end token; word k of the vocabulary has the id `first_id` + k.

    Cut and padded to `length` tokens, or neither when it is None. Words cut off are named in a warning, unless `quiet`;
    cutting a placeholder raises TokenError.
    """
    rows = {word: first_id + row for row, word in enumerate(vocabulary.embeddings)}
    ids = [number for number, _ in _weighted_ids(prompt, tokenizer, vocabulary, rows)]
    if length is None:
        return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    kept, cut = ids[: length - 2], ids[length - 2 :]
    if cut:
        _report_cut(prompt, cut, tokenizer, rows, length, quiet=quiet)
    padding = tokenizer.pad_token_id
    return [tokenizer.bos_token_id, *kept, tokenizer.eos_token_id, *[padding] * (length - 2 - len(kept))]


def token_weights(prompt: str, tokenizer: Any, vocabulary: Vocabulary, length: int) -> list[float]:
    """The weights of the tokens that `token_ids` gives, cut and padded to `length`; the prompt's own syntax sets them."""
    rows = dict.fromkeys(vocabulary.embeddings, 0)
    weights = [weight for _, weight in _weighted_ids(prompt, tokenizer, vocabulary, rows)][: length - 2]
    return [1.0, *weights, *[1.0] * (length - 1 - len(weights))]


def _weighted_ids(
    prompt: str, tokenizer: Any, vocabulary: Vocabulary, rows: Mapping[str, int]
) -> list[tuple[int, float]]:
    ids: list[tuple[int, float]] = []
    for piece, weight in vocabulary.pieces(prompt):
        own = [rows[piece]] if piece in rows else tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        ids.extend((number, weight) for number in own)
    return ids


def _report_cut(
    prompt: str, cut: list[int], tokenizer: Any, rows: Mapping[str, int], length: int, *, quiet: bool
) -> None:
    lost = [word for word, row in rows.items() if row in cut]
    if lost:
        raise TokenError(
            f"the prompt is longer than the text encoder's {length} tokens and {lost[0]} would be cut: '{shown(prompt)}'"
        )
    if not quiet:
        logger.warning("prompt cut to %d tokens; lost: '%s'", length, shown(tokenizer.decode(cut), 200))
