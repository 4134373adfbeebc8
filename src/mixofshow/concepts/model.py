"""A base model that knows concepts: one of its own, many fused, or none."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel
from torch import Tensor

from mixofshow.bases.checkpoints import is_checkpoint
from mixofshow.bases.families import TextEncoder, family_of, of_encoders, text_encoders, token_width
from mixofshow.bases.layers import count_groups, layer, matrix
from mixofshow.bases.loading import GUIDANCE, USUAL_GUIDANCE, base_name, fingerprint, load_base, load_named_base
from mixofshow.concepts.adapters import replaced, tuned_weights
from mixofshow.concepts.concept import Concept, load_concept, raise_if, value_problems, vocabulary
from mixofshow.concepts.delta import Compression, Delta, DeltaInfo, compressed, load_delta
from mixofshow.concepts.words import Vocabulary, check_word
from mixofshow.errors import ConceptFileError, shown
from mixofshow.files import parse_tensors, write_tensors
from mixofshow.outputs import write_text, writing_folder
from mixofshow.reading import parse_json, read_bytes

MANIFEST: Final = "concepts.json"
VECTORS: Final = "concepts.safetensors"
CONCEPTS: Final = "concepts"
DELTA_SUFFIX: Final = ".safetensors"


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

    @property
    def usual_guidance(self) -> float:
        """The guidance scale that suits the base."""
        return GUIDANCE.get(str(self.manifest.get("base") or base_name(self.pipeline)), USUAL_GUIDANCE)

    def class_words(self) -> list[tuple[str, tuple[str, ...], str]]:
        """(name, words, class word) of each concept of which that is known; a model of an older version knows none."""
        if self.concepts:
            return [(one.info.name, one.info.words, one.info.class_word) for one in self.concepts]
        return [(one.name, one.words, one.class_word) for one in _listed(self.manifest, "the model") if one.words]

    @property
    def concept_hashes(self) -> dict[str, str]:
        """The content hash of each concept in the model, by name."""
        if self.concepts:
            return {one.info.name: one.hash for one in self.concepts}
        return {one.name: one.hash for one in _listed(self.manifest, "the model")}

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

    def save_delta(self, path: Path, rank: int | None = None) -> Compression:
        """Write only what the model changes of its base, as one file: in full, or cut to a rank, with what that lost.

        `load_model` puts it on the base again.
        """
        own = ((name, matrix(layer(self.pipeline, name))) for name in self.weights)
        changes, lost = compressed(((name, self.weights[name].double() - base.double()) for name, base in own), rank)
        info = DeltaInfo(
            base=base_name(self.pipeline),
            base_fingerprint=fingerprint(self.pipeline),
            words=tuple(self.vocabulary.embeddings),
            aliases=dict(self.vocabulary.aliases),
            manifest=dict(self.manifest),
        )
        Delta(info, self.vocabulary.embeddings, changes).save(path)
        return lost

    def _with_plain_tokens(self) -> Any:
        """The pipeline with grown tokenizers and text encoders; only these are copies."""
        if not self.vocabulary.embeddings:
            return self.pipeline
        parts = dict(self.pipeline.components)
        vectors = torch.stack([vector.mean(0) for vector in self.vocabulary.embeddings.values()])
        names = family_of(self.pipeline).text_encoders
        owns = of_encoders(self.pipeline, vectors)
        for (part, tokenizer), encoder, own in zip(names, text_encoders(self.pipeline), owns, strict=True):
            parts[part], parts[tokenizer] = _grown(encoder, list(self.vocabulary.embeddings), own)
        settings = {key: value for key, value in self.pipeline.config.items() if key in _settings_of(self.pipeline)}
        return type(self.pipeline)(**parts, **settings)


def _settings_of(pipeline: Any) -> set[str]:
    """The names of what a pipeline is made with beside its parts, as whether it has a safety checker."""
    return set(pipeline._get_signature_keys(pipeline)[1])


def _grown(encoder: TextEncoder, words: Sequence[str], vectors: Tensor) -> tuple[Any, Any]:
    """Copies of a text encoder and its tokenizer that know some more words, whose vectors are (words, dim)."""
    model, tokenizer = copy.deepcopy(encoder.model), copy.deepcopy(encoder.tokenizer)
    tokenizer.add_tokens(words)
    model.resize_token_embeddings(encoder.first_id + len(words), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[encoder.first_id :] = vectors
    # With the 2 that old configurations say, transformers takes the largest id for the end: now that of a word.
    model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def with_concept(pipeline: Any, concept: Concept, *, unet: float = 1.0, text_encoder: float = 1.0) -> ConceptModel:
    """The base model with one concept, at the given strengths (0: its words only, 1: as tuned)."""
    strengths = {"unet": unet, "text_encoder": text_encoder}
    weights = tuned_weights(pipeline, concept, concept.deltas, strengths)
    return ConceptModel(pipeline, vocabulary([concept]), weights, concepts=(concept,))


def load_model(name: str | Path, *, base: str | Path | None = None, **options: Any) -> ConceptModel:
    """A fused model's folder or delta file, or any base model (which knows no concept); `options` are `load_base`'s.

    A delta file is put on the base that it names, or on `base` if that is given. Raises BaseModelError,
    ConceptFileError, TokenError.
    """
    path = Path(name)
    if (path.is_file() or path.suffix == DELTA_SUFFIX) and not is_checkpoint(path):
        return _on_base(load_delta(path), str(name), base, **options)
    pipeline = load_base(name, **options)
    if not (path / MANIFEST).is_file():
        return ConceptModel(pipeline)
    known, manifest = _read_vocabulary(path, pipeline)
    return ConceptModel(pipeline, known, {}, manifest)


def _on_base(delta: Delta, name: str, base: str | Path | None, **options: Any) -> ConceptModel:
    """What the delta file `name` holds, on its base."""
    info = delta.info
    _listed(info.manifest, name)
    pipeline = load_named_base(info.base, base, name, **options)
    delta.check_fits(pipeline, name)
    known = _checked_vocabulary(_Words(words=info.words, aliases=info.aliases), delta.vectors, pipeline, name)
    return ConceptModel(pipeline, known, delta.weights(pipeline), info.manifest)


def load_unfused(name: str | Path, *, base: str | Path | None = None, **options: Any) -> ConceptModel:
    """A fused folder as its base model under the fused weights, together with the concepts that it was fused from.

    It draws what `load_model` draws, and can also draw each concept as it was tuned. Options and errors are
    those of `load_model`; `variant` and `config` are the base's.
    """
    fused = load_model(name, **{**options, "variant": None, "config": None})
    pipeline = load_named_base(str(fused.manifest.get("base", "")), base, str(name), **options)
    files = sorted((Path(name) / CONCEPTS).glob(f"*{DELTA_SUFFIX}"))
    concepts = tuple(load_concept(path, pipeline) for path in files)
    if not concepts or {one.info.name: one.hash for one in concepts} != fused.concept_hashes:
        raise ConceptFileError(f"{Path(name) / CONCEPTS}: its {len(files)} files are not the concepts of {MANIFEST}")
    changed = dict.fromkeys(layer_name for one in concepts for layer_name in one.deltas)
    weights = {layer_name: matrix(layer(fused.pipeline, layer_name)) for layer_name in changed}
    return ConceptModel(pipeline, fused.vocabulary, weights, fused.manifest, concepts)


def _listed(manifest: Mapping[str, Any], name: str) -> tuple[_Entry, ...]:
    """The concepts that the manifest of the model `name` lists. Raises ConceptFileError."""
    try:
        return _Concepts.model_validate({"concepts": manifest.get("concepts", ())}).concepts
    except ValueError as error:
        raise ConceptFileError(f"{name}: {MANIFEST} does not list concepts as expected ({shown(error)})") from error


class _Entry(BaseModel):
    """A concept in a manifest."""

    name: str
    hash: str = ""
    words: tuple[str, ...] = ()
    class_word: str = ""


class _Concepts(BaseModel):
    """What a manifest says about the concepts in a model."""

    concepts: tuple[_Entry, ...] = ()


class _Words(BaseModel):
    """The part of a manifest that this module reads."""

    words: tuple[str, ...] = ()
    aliases: dict[str, tuple[str, ...]] = {}


def _read_vocabulary(folder: Path, pipeline: Any) -> tuple[Vocabulary, dict[str, Any]]:
    """The words of a fused folder, and the whole manifest."""
    path, listing = folder / VECTORS, folder / MANIFEST
    vectors, _ = parse_tensors(read_bytes(path), str(path))
    try:
        manifest = parse_json(read_bytes(listing), str(listing), ConceptFileError)
        found = _Words.model_validate(manifest)
        _listed(manifest, str(listing))
    except (ValueError, AttributeError) as error:
        raise ConceptFileError(f"{listing}: not the expected table ({shown(error)})") from error
    return _checked_vocabulary(found, vectors, pipeline, f"{folder} ({MANIFEST}, {VECTORS})"), manifest


def _checked_vocabulary(found: _Words, vectors: Mapping[str, Tensor], pipeline: Any, name: str) -> Vocabulary:
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
