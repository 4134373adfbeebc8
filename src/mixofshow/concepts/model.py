"""A base model that knows concepts: one of its own, many fused, or none."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel
from torch import Tensor

from mixofshow.bases.layers import cross_attentions, token_width
from mixofshow.bases.loading import load_base
from mixofshow.concepts.adapters import replaced, tuned_weights
from mixofshow.concepts.concept import Concept, value_problems, vocabulary
from mixofshow.concepts.words import Vocabulary, check_word
from mixofshow.errors import ConceptFileError, shown
from mixofshow.files import parse_tensors, read_bytes, write_tensors, write_text, writing_folder

MANIFEST: Final = "concepts.json"
VECTORS: Final = "concepts.safetensors"
CONCEPTS: Final = "concepts"


@dataclass(frozen=True)
class ConceptModel:
    """A pipeline, the words it understands, and the weights it has while it draws them.

    The pipeline itself is left as it is, so that several models can share one: `weights` replace its own, layer by
    layer (out, in), only inside `active()`. Saved with it are the `concepts` it was fused from, so that one can be
    added or taken out later.
    """

    pipeline: Any
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    concepts: Sequence[Concept] = ()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the pipeline has this model's weights."""
        with replaced(self.pipeline, self.weights):
            yield

    def save(self, folder: Path) -> None:
        """Write a diffusers folder that plain diffusers loads, with the words' vectors and a manifest beside it.

        For plain diffusers each word is also a token, whose vector is the mean over the layers.
        """
        with writing_folder(folder) as temporary, self.active():
            self._with_plain_tokens().save_pretrained(temporary)
            vectors = {word: vector.contiguous() for word, vector in self.vocabulary.embeddings.items()}
            write_tensors(temporary / VECTORS, vectors, {"format": "pt"})
            manifest = {
                **self.manifest,
                "words": list(self.vocabulary.embeddings),
                "aliases": dict(self.vocabulary.aliases),
            }
            write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            for concept in self.concepts:
                concept.save(temporary / CONCEPTS / f"{concept.info.name}.safetensors")

    def _with_plain_tokens(self) -> Any:
        """The pipeline with a grown tokenizer and text encoder; only these two are copies."""
        if not self.vocabulary.embeddings:
            return self.pipeline
        tokenizer, text_encoder = copy.deepcopy(self.pipeline.tokenizer), copy.deepcopy(self.pipeline.text_encoder)
        first = text_encoder.get_input_embeddings().num_embeddings
        tokenizer.add_tokens(list(self.vocabulary.embeddings))
        text_encoder.resize_token_embeddings(first + len(self.vocabulary.embeddings), mean_resizing=False)
        table = text_encoder.get_input_embeddings().weight
        with torch.no_grad():
            for row, vector in enumerate(self.vocabulary.embeddings.values()):
                table[first + row] = vector.mean(0)
        parts = {**self.pipeline.components, "tokenizer": tokenizer, "text_encoder": text_encoder}
        return type(self.pipeline)(**parts, requires_safety_checker=False)


def with_concept(pipeline: Any, concept: Concept, *, unet: float = 1.0, text_encoder: float = 1.0) -> ConceptModel:
    """The base model with one concept, at the given strengths (0: its words only, 1: as tuned)."""
    strengths = {"unet": unet, "text_encoder": text_encoder}
    weights = tuned_weights(pipeline, concept, concept.deltas, strengths)
    return ConceptModel(pipeline, vocabulary([concept]), weights)


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ConceptModel:
    """A fused model's folder, or any base model (which knows no concept). Raises BaseModelError, ConceptFileError."""
    pipeline = load_base(name, device=device, dtype=dtype)
    if not (Path(name) / MANIFEST).is_file():
        return ConceptModel(pipeline)
    known, manifest = _read_vocabulary(Path(name), (len(cross_attentions(pipeline.unet)), token_width(pipeline)))
    known = replace(known, embeddings={word: vector.to(device) for word, vector in known.embeddings.items()})
    return ConceptModel(pipeline, known, {}, manifest)


class _Words(BaseModel):
    """The part of a manifest that this module reads."""

    words: tuple[str, ...] = ()
    aliases: dict[str, tuple[str, ...]] = {}


def _read_vocabulary(folder: Path, shape: tuple[int, int]) -> tuple[Vocabulary, dict[str, Any]]:
    """The words of a fused folder, each with vectors of `shape`, (layers, dim), and the whole manifest."""
    path, listing = folder / VECTORS, folder / MANIFEST
    vectors, _ = parse_tensors(read_bytes(path), str(path))
    try:
        manifest = json.loads(read_bytes(listing))
        found = _Words.model_validate(manifest)
    except (ValueError, RecursionError) as error:
        raise ConceptFileError(f"{listing}: not the expected table ({shown(error)})") from error
    for word in (*found.words, *found.aliases):
        check_word(word)
    if sorted(found.words) != sorted(vectors):
        raise ConceptFileError(
            f"{path}: words {shown(sorted(vectors))} are not those of {MANIFEST}, {shown(sorted(found.words))}"
        )
    for alias, parts in found.aliases.items():
        if alias in vectors or not set(parts) <= vectors.keys():
            raise ConceptFileError(f"{listing}: alias {alias} is taken or stands for unknown words, {shown(parts)}")
    problems = value_problems(vectors)
    problems += [
        f"word {word}: expected (layers, dim) = {shape} or (1, {shape[1]}), found {tuple(vector.shape)}"
        for word, vector in vectors.items()
        if vector.shape not in (shape, (1, shape[1]))
    ]
    if problems:
        raise ConceptFileError(f"{path}: {problems[0]}")
    return Vocabulary({word: vectors[word] for word in found.words}, found.aliases), manifest
