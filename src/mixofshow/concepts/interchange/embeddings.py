"""Words of other tools' files: textual inversions, layer-wise embeddings, and trigger words.

tool                       tensors
Mix-of-Show                params/new_concept_embedding/<word>   (layers, dim)
A1111, .pt                 string_to_param/*                     (words, dim)
A1111, .safetensors        emb_params                            (words, dim)
OneTrainer, A1111, in LoRA bundle_emb.NAME. and one of these     (words, dim)
diffusers                  the word itself, or no name           (dim,) or (words, dim)
all of them, for SDXL      clip_l and clip_g                     (words, dim) of each text encoder
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.bases.families import text_encoders
from mixofshow.bases.layers import count_groups
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.concepts.words import check_word
from mixofshow.errors import ConceptFileError, MixOfShowError, TokenError, shown
from mixofshow.reading import parse_json

LAYERWISE: Final = re.compile(r"^(?:params/)?new_concept_embedding/(.+)$", re.DOTALL)
NAMELESS: Final = re.compile(r"^(?:|string_to_param[/.].*|emb_params|clip_l)$", re.DOTALL)
BUNDLED: Final = re.compile(r"^bundle_emb\.(.+?)\.(string_to_param\..*|emb_params|clip_[lg])$", re.DOTALL)
TABLES: Final = ("clip_l", "clip_g")
"""What all tools call the tables of SDXL's two text encoders, in their order."""
MAX_WORDS: Final = 75
"""What fits into a prompt."""
LONGEST_NAME: Final = 30
_NUMBERED_FOLDER: Final = re.compile(r"^\d+_(.+)$")


@dataclass(frozen=True)
class Words:
    """Vectors (words, layers or 1, dim), with the names and initializers of the words as far as they are known."""

    vectors: Tensor
    names: Sequence[str] = ()
    initializers: tuple[str, ...] = ()

    def check_fits(self, pipeline: Any, file: str) -> None:
        """Raise ConceptFileError unless there is one vector for all of this base's layers, or one for each."""
        count, layers, _ = self.vectors.shape
        known = count_groups(pipeline.unet)
        if layers not in (1, known):
            raise ConceptFileError(f"{file}: embeddings of {layers} layers, this base has {known}")
        if count > MAX_WORDS:
            raise ConceptFileError(f"{file}: {count} vectors, a concept has at most {MAX_WORDS}")


def file_words(tensors: Mapping[str, Tensor], file: str, *, plain: bool) -> Words | None:
    """The words among a file's tensors, if any; `plain`: unknown names are words, as in diffusers' files.

    Raises ConceptFileError for tensors that are none.
    """
    names: list[str] = []
    vectors: list[Tensor] = []
    for (name, key), tensor in _side_by_side(tensors, file).items():
        found, nameless = LAYERWISE.match(key), NAMELESS.match(key)
        if not (found or nameless or plain):
            raise ConceptFileError(
                f"{file}: tensor '{shown(key)}' is not known; a LoRA is read, no other kind of adapter"
            )
        if tensor.ndim not in ((2,) if found else (1, 2)) or 0 in tensor.shape or len(vectors) > MAX_WORDS:
            raise ConceptFileError(
                f"{file}: tensor '{shown(key)}' of shape {tuple(tensor.shape)} is no embedding of a word"
            )
        several = tensor.float()[None] if found else tensor.float().reshape(-1, 1, tensor.shape[-1])
        vectors.extend(several)
        if name or found or not nameless:
            names.extend(_numbered(name or (found.group(1) if found else key), len(several)))
    if not vectors:
        return None
    if len({one.shape for one in vectors}) > 1:
        raise ConceptFileError(
            f"{file}: embeddings of different shapes, {sorted({tuple(one.shape) for one in vectors})}"
        )
    return Words(torch.stack(vectors), names if len(names) == len(vectors) else ())


def _side_by_side(tensors: Mapping[str, Tensor], file: str) -> dict[tuple[str, str], Tensor]:
    """By the word that a bundle names and the key; the tables of several text encoders as one without a key."""
    found: dict[tuple[str, str], Tensor] = {}
    for full, tensor in tensors.items():
        bundled = BUNDLED.match(full)
        found[(_as_word(bundled[1]), bundled[2]) if bundled else ("", full)] = tensor
    for word in dict.fromkeys(word for word, key in found if key == TABLES[1]):
        tables = [found.pop((word, name), torch.empty(0)) for name in TABLES]
        if any(one.ndim != 2 for one in tables) or len({len(one) for one in tables}) > 1:
            shapes = " and ".join(str(tuple(one.shape)) for one in tables)
            raise ConceptFileError(
                f"{file}: tables of {' and '.join(TABLES)}: expected as many words in each, found {shapes}"
            )
        found[word, ""] = torch.cat([one.float() for one in tables], dim=1)
    return found


def _as_word(name: str) -> str:
    """A placeholder called after what a bundle calls its embedding."""
    return f"<{re.sub(r'[^a-z0-9_-]+', '-', name.lower()).strip('-_')[:LONGEST_NAME]}>"


def _numbered(word: str, count: int) -> list[str]:
    """`<cat>` alone, or `<cat1>`, `<cat2>` …, `<v2-1>`, `<v2-2>` …; other texts likewise."""
    if count == 1:
        return [word]
    start, end = (word[:-1], ">") if word.endswith(">") else (word, "")
    start += "-" if start[-1:].isdigit() else ""
    return [f"{start}{number}{end}" for number in range(1, count + 1)]


def named(found: Sequence[str], count: int, settings: ImportSettings, file: str) -> tuple[str, tuple[str, ...]]:
    """A concept's name and its `count` words: as given, or as `found`, or after the file. Raises TokenError."""
    words = tuple(word.lower() for word in found)  # which is how prompts are read
    given = tuple((settings.words or "").lower().split())
    if words and given and words != given:
        raise TokenError(
            f"{file}: its words are {shown(' '.join(words))}, not {shown(' '.join(given))}; another name renames them"
        )
    words = words or given
    if settings.name or not words:
        name = settings.name or _file_name(file)
        return name, tuple(_numbered(f"<{name}>", count))
    if len(words) != count:
        raise TokenError(f"{file}: {count} vectors, but {len(words)} words: {shown(' '.join(words))}")
    for word in words:
        try:
            check_word(word)
        except TokenError as error:
            raise TokenError(
                f"{file}: {error}; choose a name for the concept, and its words are named after it"
            ) from error
    if len(set(words)) < count:
        raise TokenError(
            f"{file}: the words {shown(' '.join(words))} are not all different; choose a name for the concept"
        )
    inner = [word[1:-1] for word in words]
    shared = "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*inner, strict=False)))
    return shared.rstrip("-_") or (inner[0] if count == 1 else _file_name(file)), words


def _file_name(file: str) -> str:
    name = re.sub(r"[^a-z0-9_-]+", "-", Path(file).stem.lower()).strip("-_")[:LONGEST_NAME]
    if not name:
        raise TokenError(f"{file}: no name can be made of the file's; choose a name for the concept")
    return name


def trigger_words(texts: Mapping[str, str], pipeline: Any, settings: ImportSettings, file: str) -> Words:
    """A LoRA's trigger words, given or in its metadata, as vectors (tokens, 1, dim). Raises TokenError."""
    text = settings.words or texts.get("modelspec.trigger_phrase") or _training_folder(texts.get("ss_tag_frequency"))
    if not text:
        raise TokenError(
            f"{file}: a LoRA without embeddings, whose metadata names no trigger words; say what `words` draw it"
        )
    encoders = text_encoders(pipeline)
    tokenizer = encoders[0].tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids or set(ids) & set(tokenizer.all_special_ids):
        raise TokenError(f"{file}: this base does not know the words '{shown(text)}'")
    if len(ids) > MAX_WORDS:
        raise TokenError(
            f"{file}: '{shown(text)}' are {len(ids)} tokens, at most {MAX_WORDS} can be trigger words; give fewer"
        )
    rows = torch.cat([one.table[ids].detach().float().cpu() for one in encoders], dim=1)
    return Words(rows[:, None].clone(), initializers=tuple(tokenizer.convert_ids_to_tokens(ids)))


def _training_folder(frequencies: str | None) -> str | None:
    """What kohya's scripts trained on, when that was one folder: "sks dog" of `10_sks dog`."""
    try:
        folders = list(parse_json(frequencies or "{}", "ss_tag_frequency"))
    except (MixOfShowError, TypeError):
        return None  # a note of another tool that we need not understand
    found = _NUMBERED_FOLDER.match(str(folders[0])) if len(folders) == 1 else None
    return found.group(1) if found else None
