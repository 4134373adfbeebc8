"""A base model that knows concepts: one of its own, many fused, or none."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.bases.families import TextEncoder, family_of, of_encoders, takes_masks, text_encoders, token_width
from mixofshow.bases.layers import count_groups, layer, matrix, tunable_layers, where_double
from mixofshow.bases.loading import (
    EMBEDDED,
    GUIDANCE,
    USUAL_GUIDANCE,
    base_name,
    fingerprint,
    load_base,
    load_named_base,
)
from mixofshow.bases.parts import exclusive, own_tensors, plain, refuse_adapters
from mixofshow.bases.strangers import quiet
from mixofshow.bases.weight_files import is_checkpoint
from mixofshow.concepts.adapters import replaced, tuned_weights
from mixofshow.concepts.concept import Concept, fitted, raise_if, value_problems, vocabulary
from mixofshow.concepts.delta import Compression, Delta, DeltaInfo, compressed, load_delta
from mixofshow.concepts.manifest import (
    CONCEPTS,
    MANIFEST,
    SUFFIX,
    Entry,
    Manifest,
    StoredConcepts,
    make_manifest,
    read_concepts,
    read_manifest,
)
from mixofshow.concepts.words import Vocabulary, check_word
from mixofshow.errors import BadInputError, BaseModelError, ConceptFileError, shown
from mixofshow.files import parse_tensors, write_tensors
from mixofshow.outputs import restore, write_text, writing_folder
from mixofshow.reading import read_bytes

logger = logging.getLogger(__name__)

VECTORS: Final = "concepts.safetensors"


@dataclass(frozen=True)
class ConceptModel:
    """A pipeline, the words it understands, and the weights it has while it draws them.

    The pipeline itself is left as it is, so that several models can share one: `weights` replace its own, layer by
    layer (out, in), only inside `active()`. In a `baked` model they are the pipeline's own instead. Saved with it are
    the `concepts` it was made from, so that one can be added or taken out later; `settings` and `threads` are those of
    fusion, and `stored` is what a loaded model's file says of all this.
    """

    pipeline: Any
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    concepts: Sequence[Concept] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    stored: Manifest | None = None
    baked: bool = False

    @property
    def base(self) -> str:
        """The name of the base that the model was made on."""
        return (self.stored.base if self.stored else "") or base_name(self.pipeline)

    @property
    def usual_guidance(self) -> float:
        """The guidance scale that suits the base."""
        known = self.stored.guidance_scale if self.stored else None
        return GUIDANCE.get(self.base, USUAL_GUIDANCE) if known is None else known

    @property
    def listed(self) -> tuple[Entry, ...]:
        """What there is to say of each concept in the model; an older version's file may not say all of it."""
        stored = self.stored.concepts if self.stored else ()
        if stored and (all(one.words for one in stored) or not self.concepts):
            return stored
        return tuple(Entry.of(one) for one in self.concepts)

    @property
    def manifest(self) -> Manifest:
        """What is saved beside the model about it."""
        return Manifest(
            base=self.base,
            guidance_scale=self.usual_guidance,
            settings=self.stored.settings if self.stored else dict(self.settings),
            threads=self.stored.threads if self.stored else self.threads,
            concepts=self.listed,
            words=tuple(self.vocabulary.embeddings),
            aliases=dict(self.vocabulary.aliases),
        )

    def class_words(self) -> list[tuple[str, tuple[str, ...], str]]:
        """(name, words, class word) of each concept of which that is known; a model of an older version knows none."""
        return [(one.name, one.words, one.class_word) for one in self.listed if one.words]

    @property
    def concept_hashes(self) -> dict[str, str]:
        """The content hash of each concept in the model, by name."""
        return {one.name: one.hash for one in self.listed}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the pipeline has this model's weights, and no other thread uses it."""
        with exclusive(self.pipeline), replaced(self.pipeline, self.weights):
            yield

    def save(self, folder: str | Path, **options: Any) -> None:
        """Write a diffusers folder that plain diffusers loads, with the words' vectors and a manifest beside it.

        For plain diffusers each word is also a token, whose vector is the mean over the layers. `options` are those of
        its `save_pretrained`, as `variant`. Raises BaseModelError while adapters (LoRAs) are attached.
        """
        refuse_adapters(self.pipeline, "saving")
        concepts = tuple(self.concepts)  # read before anything is written, perhaps over them
        with writing_folder(folder) as temporary, self.active(), quiet():
            pipeline = self.as_diffusers()
            for _, tokenizer in family_of(pipeline).text_encoders:
                _forget_last_call(getattr(pipeline, tokenizer))
            pipeline.save_pretrained(temporary, **options)
            vectors = {word: vector.contiguous() for word, vector in self.vocabulary.embeddings.items()}
            write_tensors(temporary / VECTORS, vectors, {"format": "pt"})
            write_text(temporary / MANIFEST, json.dumps(self.manifest.model_dump(mode="json"), indent=1) + "\n")
            for concept in concepts:
                concept.save(temporary / CONCEPTS / f"{concept.info.name}{SUFFIX}")

    def save_delta(self, path: str | Path, rank: int | None = None) -> Compression:
        """Write only what the model changes of its base, as one file: in full, or cut to a rank, with what that lost.

        `load_model` puts it on the base again. Raises BadInputError for a `baked` model, whose base is not there.
        """
        if self.baked:
            raise BadInputError(
                f"save_delta: the changes of base '{shown(self.base)}' are in this model's own weights; load its folder "
                "by load_unfused, which keeps the two apart"
            )
        refuse_adapters(self.pipeline, "saving")
        own = ((name, where_double(matrix(layer(self.pipeline, name)))) for name in self.weights)
        with exclusive(self.pipeline):
            changes, lost = compressed(
                ((name, where_double(self.weights[name]).double() - base.double()) for name, base in own), rank
            )
        info = DeltaInfo(
            base=base_name(self.pipeline),
            base_fingerprint=fingerprint(self.pipeline),
            words=tuple(self.vocabulary.embeddings),
            aliases=dict(self.vocabulary.aliases),
            manifest=self.manifest.model_dump(mode="json"),
        )
        Delta(info, self.vocabulary.embeddings, changes).save(Path(path))
        return lost

    def as_diffusers(self) -> Any:
        """A pipeline of diffusers' own class whose tokenizers and text encoders know the words; only these are copies.

        Its weights are the pipeline's: the model's own inside `active()`.
        """
        import diffusers

        family = family_of(self.pipeline)
        kind = getattr(diffusers, family.inpainting_class if takes_masks(self.pipeline) else family.pipeline_class)
        modules, options = kind._get_signature_keys(kind)
        parts = {name: plain(getattr(self.pipeline, name, None)) for name in modules}
        if self.vocabulary.embeddings:
            vectors = torch.stack([vector.mean(0) for vector in self.vocabulary.embeddings.values()])
            names = family_of(self.pipeline).text_encoders
            owns = of_encoders(self.pipeline, vectors)
            for (part, tokenizer), encoder, own in zip(names, text_encoders(self.pipeline), owns, strict=True):
                parts[part], parts[tokenizer] = _grown(encoder, list(self.vocabulary.embeddings), own)
        return kind(**parts, **{key: self.pipeline.config[key] for key in options if key in self.pipeline.config})


def _forget_last_call(tokenizer: Any) -> None:
    """A tokenizer's file would hold how it last cut and padded; each call says that anew."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_truncation()
        backend.no_padding()


def _grown(encoder: TextEncoder, words: Sequence[str], vectors: Tensor) -> tuple[Any, Any]:
    """Copies of a text encoder and its tokenizer that know some words, perhaps already, whose vectors are (words, dim)."""
    model, tokenizer = copy.deepcopy(encoder.model), copy.deepcopy(encoder.tokenizer)
    tokenizer.add_tokens(words)
    ids = tokenizer.convert_tokens_to_ids(words)
    model.resize_token_embeddings(max(encoder.first_id, *(number + 1 for number in ids)), mean_resizing=False)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[ids] = vectors.to(table)
    # With the 2 that old configurations say, transformers takes the largest id for the end: now that of a word.
    model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def with_concept(pipeline: Any, concept: Concept, strength: float = 1.0) -> ConceptModel:
    """The base model with one concept, at the given strength (0: its words only, 1: as tuned).

    Raises ConceptFileError when the concept was made for another base.
    """
    concept = fitted(concept, pipeline, f"concept <{concept.info.name}>")
    weights = tuned_weights(pipeline, concept, concept.deltas, strength)
    return ConceptModel(pipeline, vocabulary([concept]), weights, (concept,))


def with_words(pipeline: Any, concepts: Sequence[Concept]) -> ConceptModel:
    """The base model that knows concepts' words and has them at hand, un-fused: for regions that draw by their LoRAs.

    Raises ConceptFileError when one was made for another base, TokenError when two claim the same word.
    """
    there = tuple(fitted(one, pipeline, f"concept <{one.info.name}>") for one in concepts)
    return ConceptModel(pipeline, vocabulary(there), concepts=there)


def load_model(name: str | Path, *, base: str | Path | None = None, **options: Any) -> ConceptModel:
    """A fused model's folder or delta file, or any base model (which knows no concept); `options` are `load_base`'s.

    A delta file is put on the base that it names, or on `base` if that is given. Raises BaseModelError,
    ConceptFileError, TokenError.
    """
    path = Path(name)
    restore(path)
    if (os.path.isfile(path) or path.suffix == SUFFIX) and not is_checkpoint(path):
        delta = load_delta(path)
        return delta_model(delta, load_named_base(delta.info.base, base, str(name), **options), str(name))
    if base is not None:
        logger.warning("`base` changes nothing: %s is a whole model, and no delta file", shown(path, 100))
    if str(name) in EMBEDDED or not os.path.isfile(path / MANIFEST):
        return ConceptModel(load_base(name, **options))
    manifest = read_manifest(path)
    vectors, _ = parse_tensors(read_bytes(path / VECTORS), str(path / VECTORS))
    pipeline = load_base(name, **options)
    known = _checked_vocabulary(manifest, vectors, pipeline, f"{path} ({MANIFEST}, {VECTORS})")
    return ConceptModel(pipeline, known, concepts=StoredConcepts(path, manifest.hashes), stored=manifest, baked=True)


def delta_model(delta: Delta, pipeline: Any, name: str) -> ConceptModel:
    """What the delta file `name` holds, on its base. Raises ConceptFileError, TokenError."""
    info = delta.info
    manifest = make_manifest({**info.manifest, "words": info.words, "aliases": info.aliases}, name)
    delta.check_fits(pipeline, name)
    known = _checked_vocabulary(manifest, delta.vectors, pipeline, name)
    return ConceptModel(pipeline, known, delta.weights(pipeline), stored=manifest)


def load_unfused(name: str | Path, *, base: str | Path | None = None, **options: Any) -> ConceptModel:
    """A fused folder as its base model under the fused weights, together with the concepts that it was fused from.

    It draws what `load_model` draws, and can also draw each concept as it was tuned. Options and errors are
    those of `load_model`; `variant` and `config` are the base's.
    """
    fused = load_model(name, **{**options, "variant": None, "config": None, "device": "cpu"})
    read = read_concepts(Path(name), fused.concept_hashes)
    if not read:
        raise ConceptFileError(f"{Path(name) / CONCEPTS}: the concepts of {MANIFEST} are not there; fuse them anew")
    _require_finite(fused.pipeline, str(name))
    changed, layers = dict.fromkeys(key for one in read for key in one.deltas), tunable_layers(fused.pipeline)
    # Taken out of it, so that the rest makes room before the base is loaded.
    apart = {key: matrix(layers[key]).clone() for key in changed if key in layers}
    stored, words, base_of = fused.manifest, fused.vocabulary, fused.manifest.base
    del fused, layers
    pipeline = load_named_base(base_of, base, str(name), **options)
    concepts = tuple(fitted(one, pipeline, f"{name}: concept <{one.info.name}>") for one in read)
    weights = {key: weight.to(pipeline.device) for key, weight in apart.items()}
    vectors = {word: vector.to(pipeline.device) for word, vector in words.embeddings.items()}
    return ConceptModel(
        pipeline, replace(words, embeddings=vectors), weights, concepts, stored=stored.of_concepts(concepts)
    )


def _require_finite(pipeline: Any, name: str) -> None:
    """Raise BaseModelError for a fused model with numbers that are not finite: not all of them will be drawn with."""
    for part in (pipeline.unet, *(one.model for one in text_encoders(pipeline))):
        for key, tensor in own_tensors(part):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise BaseModelError(f"{name}: tensor '{shown(key)}' has numbers that are not finite; fuse it anew")


def _checked_vocabulary(found: Manifest, vectors: Mapping[str, Tensor], pipeline: Any, name: str) -> Vocabulary:
    """The words of the model `name`, each with vectors (layers, dim) or (1, dim) that fit the base, on its device."""
    for word in (*found.words, *found.aliases):
        check_word(word)
    if sorted(found.words) != sorted(vectors):
        raise ConceptFileError(
            f"{name}: words {shown(sorted(vectors))} are not those that are listed, {shown(sorted(found.words))}"
        )
    for alias, parts in found.aliases.items():
        if alias in vectors or not set(parts) <= vectors.keys():
            raise ConceptFileError(f"{name}: alias {alias} is taken or stands for unknown words, {shown(parts)}")
    shape = (count_groups(pipeline.unet), token_width(pipeline))
    problems = value_problems(vectors)
    problems += [
        f"word {word}: expected (layers, dim) = {shape} or (1, {shape[1]}), found {tuple(vector.shape)}"
        for word, vector in vectors.items()
        if vector.shape not in (shape, (1, shape[1]))
    ]
    raise_if(problems, name)
    return Vocabulary({word: vectors[word].to(pipeline.device) for word in found.words}, found.aliases)
