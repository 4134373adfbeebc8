"""Small byte-pair tokenizers of CLIP's kind, learned from captions."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Sequence[str], length: int) -> CLIPTokenizer:
    """A tokenizer to which every word of the captions is one token, and any other text a few."""
    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    pairs.normalizer = normalizers.Lowercase()
    pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=8192, end_of_word_suffix="</w>", initial_alphabet=letters, special_tokens=[], show_progress=False
    )
    pairs.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(pairs.to_str())["model"]["merges"]]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)  # type: ignore[arg-type]
