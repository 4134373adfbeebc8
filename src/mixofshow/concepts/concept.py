"""What a client shares: one tuned concept, and its file. The format is documented in docs/file-format.md.

A file is read once into memory; those bytes are checked, and only those bytes are used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from mixofshow.bases.families import (
    clip_skip_of,
    clip_skip_said,
    family_of,
    of_encoders,
    skip_text_layers,
    text_encoders,
    token_width,
)
from mixofshow.bases.layers import count_groups
from mixofshow.bases.loading import SISTER, base_name, fingerprint
from mixofshow.bases.parts import plain
from mixofshow.concepts.changes import (
    Change,
    Full,  # noqa: F401  (scripts import the two from here, where they were first)
    LowRank,  # noqa: F401
    layer_problems,
    read_changes,
)
from mixofshow.concepts.words import Vocabulary, check_word
from mixofshow.errors import ConceptFileError, TokenError, field_problem, listed, shown
from mixofshow.files import raw, read_tensors, write_tensors
from mixofshow.reading import parse_json
from mixofshow.tables import Group, Named

logger = logging.getLogger(__name__)

FORMAT_VERSION: Final = 2
"""The newest that is read. Written is the oldest that has room for the concept: 1 has none for convolutions."""
FIRST_WORDS: Final = 8
"""As many as version 1 has room for."""
METADATA_KEY: Final = "mixofshow"
DELTA_KEY: Final = "mixofshow_delta"
"""In its place, in the file of a fused model's delta."""
DIGEST_KEY: Final = "sha256"
MAX_METADATA_BYTES: Final = 16 * 2**10
EMBEDDINGS: Final = "lora_embeddings"
"""Named so that diffusers' `load_lora_weights` takes the whole file: it refuses names without "lora"."""
MADE_FOR, CLIP_SKIP = "made_for", "clip_skip"
"""Settings in the metadata: the base of which a concept was taken for a sister's; layers that its text leaves out."""
LARGEST_VALUE: Final = 1e4
LARGEST_EMBEDDING: Final = 100.0
"""Longest embedding allowed, in lengths of the base's mean token embedding."""


class ConceptInfo(Group):
    """A concept file's metadata. There is no place in it for a path, a caption or a host name."""

    format_version: int = Field(1, ge=1, le=FORMAT_VERSION)
    name: Annotated[str, Named(32)]
    words: tuple[str, ...] = Field(min_length=1, max_length=75)
    class_word: str = Field(max_length=64)
    initializers: tuple[str, ...]
    layers: int = Field(ge=1, le=256)
    family: str
    base: str = Field(max_length=128)
    base_fingerprint: str
    method: str = "ed-lora"
    rank: int = Field(default=4, ge=0)
    alpha: float = 1.0
    settings: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    license: str | None = None
    author: str | None = None


@dataclass(frozen=True)
class Concept:
    """A tuned concept: `embeddings` is (words, layers or 1, dim); `deltas` maps our layer names to weight changes.

    One vector instead of one per layer serves all layers.
    """

    info: ConceptInfo
    embeddings: Tensor
    deltas: Mapping[str, Change]

    @property
    def prompt(self) -> str:
        """What stands for the concept in a prompt, as `<cat1> <cat2>`."""
        return " ".join(self.info.words)

    @cached_property
    def hash(self) -> str:
        """Hex digits of the content (words and numbers, not the other metadata); sorting by it gives one order."""
        digest = hashlib.sha256(" ".join(self.info.words).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(raw(tensor))
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """All numbers by their names in the file, in half precision."""
        named = {EMBEDDINGS: self.embeddings}
        for layer, delta in self.deltas.items():
            named |= delta.tensors(layer)
        return {name: tensor.detach().half().cpu() for name, tensor in named.items()}

    def save(self, path: Path) -> None:
        """Write the file whole or not at all. Raises ConceptFileError or TokenError for what would not be read again."""
        tensors, metadata = self.tensors(), self.metadata()
        read_concept(dict(tensors), metadata, f"{path}: not written")
        write_tensors(path, tensors, metadata)

    def metadata(self) -> dict[str, str]:
        """All metadata of its file."""
        newer = len(self.info.words) > FIRST_WORDS or any(change.kernel for change in self.deltas.values())
        version = 2 if newer else 1
        text = self.info.model_copy(update={"format_version": version}).model_dump_json()
        return _metadata(text, self.hash)


def _metadata(text: str, content: str) -> dict[str, str]:
    """All metadata of a file whose info is `text` and whose content has the hash `content`; a digest covers both."""
    return {"format": "pt", METADATA_KEY: text, DIGEST_KEY: hashlib.sha256(f"{content} {text}".encode()).hexdigest()}


def vocabulary(concepts: Iterable[Concept]) -> Vocabulary:
    """The words of several concepts together. Raises TokenError when two claim the same word."""
    embeddings: dict[str, Tensor] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for concept in concepts:
        alias = f"<{concept.info.name}>"
        for word in {*concept.info.words, alias}:
            if word in embeddings or word in aliases:
                raise TokenError(
                    f"two concepts claim the placeholder {word}; tune or save one of them under another name"
                )
        embeddings |= dict(zip(concept.info.words, concept.embeddings, strict=True))
        if alias not in concept.info.words:
            aliases[alias] = concept.info.words
    return Vocabulary(embeddings, aliases)


def load_concept(path: str | Path, pipeline: Any = None) -> Concept:
    """Read a concept file; with a pipeline, also check that it fits. Raises ConceptFileError or TokenError."""
    name = str(path)
    return read_concept(*read_tensors(Path(path)), name, pipeline)


def read_concept(tensors: dict[str, Tensor], metadata: Mapping[str, str], name: str, pipeline: Any = None) -> Concept:
    """The concept of a file's tensors and metadata, checked in the same way; `name` is the file's, for errors."""
    info = _read_info(metadata, name)
    concept = Concept(info, *_read_tensors(tensors, info, name))
    if metadata != _metadata(metadata[METADATA_KEY], concept.hash):
        raise ConceptFileError(f"{name}: damaged: its content does not match the digest written in it")
    return concept if pipeline is None else fitted(concept, pipeline, name)


def _read_info(metadata: Mapping[str, str], name: str) -> ConceptInfo:
    text = metadata.get(METADATA_KEY)
    if text is None:
        if DELTA_KEY in metadata:
            raise ConceptFileError(f"{name}: a fused model's delta, not a concept; `mixofshow sample` draws with it as its `model`")
        raise ConceptFileError(f"{name}: not a mixofshow concept, its metadata has no '{METADATA_KEY}'")
    if len(text) > MAX_METADATA_BYTES:
        raise ConceptFileError(f"{name}: metadata of {len(text)} characters, at most {MAX_METADATA_BYTES} are read")
    try:
        table = parse_json(text, f"{name}: metadata", ConceptFileError)
        version = table["format_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ConceptFileError(f"{name}: made in format {shown(version)}, this version reads <= {FORMAT_VERSION}")
        info = ConceptInfo.model_validate(table)
    except ValidationError as error:
        problem = field_problem(error.errors()[0], ConceptInfo.model_fields)
        raise ConceptFileError(f"{name}: metadata field {problem}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConceptFileError(f"{name}: metadata is not the expected table ({shown(error)})") from error
    if len(info.initializers) != len(info.words):
        raise ConceptFileError(
            f"{name}: {len(info.words)} words but {len(info.initializers)} initializers in the metadata"
        )
    try:
        for word in info.words:
            check_word(word)
            if info.words.count(word) > 1:
                raise TokenError(f"the placeholder {word} is there twice")
    except TokenError as error:
        raise TokenError(f"{name}: {error}") from error
    return info


def _read_tensors(tensors: dict[str, Tensor], info: ConceptInfo, name: str) -> tuple[Tensor, dict[str, Change]]:
    problems = value_problems(tensors)
    # Full precision is allowed, but what is used is what the digest covers: the values in half precision.
    tensors = {key: tensor.half().float() for key, tensor in tensors.items()}
    embeddings = tensors.pop(EMBEDDINGS, torch.empty(0))
    if embeddings.ndim != 3 or embeddings.shape[:2] != (len(info.words), info.layers):
        problems.append(
            f"tensor '{EMBEDDINGS}': expected ({len(info.words)} words, {info.layers} layers, dim), found {tuple(embeddings.shape)}"
        )
    changes, more = read_changes(tensors)
    raise_if([*problems, *more], name)
    return embeddings, changes


def value_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the numbers of a stranger's tensors, a line for each."""
    problems = []
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            problems.append(f"tensor '{shown(key)}': expected fp16, bf16 or fp32, found {tensor.dtype}")
            continue
        bad = ~torch.isfinite(tensor) | (tensor.abs() > LARGEST_VALUE)
        if bad.any():
            place = tuple(bad.nonzero()[0].tolist())
            problems.append(
                f"tensor '{shown(key)}': {int(bad.sum())} values are not finite or over {LARGEST_VALUE:g}, the first at {place}"
            )
    return problems


def fitted(concept: Concept, pipeline: Any, name: str, *, base: str | None = None, quiet: bool = False) -> Concept:
    """The concept on this base. Of a sister base, where that is allowed, it is as if made for this one, and says so.

    Raises ConceptFileError as `check_fits`; warns, unless `quiet`, when its text was read before another layer of the
    text encoder.
    """
    family_of(pipeline)  # so that what is no base model is told as that
    info, found = concept.info, base or fingerprint(pipeline)
    if info.base_fingerprint != found and getattr(plain(pipeline.unet), "takes_sisters", False):
        made_for = f"{info.base} ({info.base_fingerprint})"
        _say(f"{name}: made for base {shown(made_for)}, taken for {base_name(pipeline)} all the same")
        settings = {**info.settings, MADE_FOR: info.settings.get(MADE_FOR) or made_for}
        change = {"base": base_name(pipeline), "base_fingerprint": found, "settings": settings}
        concept = dataclasses.replace(concept, info=info.model_copy(update=change))
    check_fits(concept, pipeline, name, base=found)
    said, own = info.settings.get(CLIP_SKIP, 0), clip_skip_said(pipeline)
    if said != own and not quiet:
        _say(f"concept <{info.name}>: made with clip skip {shown(said, 20)}, this base has {own}; `clip_skip` sets it")
    return concept


@cache
def _say(line: str) -> None:
    """Once: a concept is looked at whenever it is put on a base."""
    logger.warning(line)


def follow_clip_skip(pipeline: Any, concepts: Iterable[Concept]) -> None:
    """Let the text be read as the concepts say, if they agree and the base itself says nothing. Raises BaseModelError."""
    said = {concept.info.settings.get(CLIP_SKIP, 0) for concept in concepts}
    silent = all(clip_skip_of(one.model) is None for one in text_encoders(pipeline))
    if silent and len(said) == 1 and isinstance(skip := said.pop(), int | str):
        skip_text_layers(pipeline, skip or None)


def check_fits(concept: Concept, pipeline: Any, name: str, *, base: str | None = None) -> None:
    """Raise ConceptFileError unless the concept was made for this base: family, fingerprint, layers, shapes, limits.

    `base` is the pipeline's fingerprint, where that is known already.
    """
    info = concept.info
    if info.family != family_of(pipeline).name:
        raise ConceptFileError(
            f"{name}: made for a base of family '{shown(info.family)}', this one is '{family_of(pipeline).name}'"
        )
    problems = _shape_problems(concept, pipeline)
    raise_if(problems, name)
    if info.base_fingerprint != (found := base or fingerprint(pipeline)):
        raise ConceptFileError(
            f"{name}: made for base '{shown(info.base)}' ({shown(info.base_fingerprint)}), this base is {found}; nothing "
            f"was changed (`allow_base` {SISTER} takes it all the same)"
        )


def _shape_problems(concept: Concept, pipeline: Any) -> list[str]:
    problems = []
    layers, width = count_groups(pipeline.unet), token_width(pipeline)
    if concept.embeddings.shape[1] not in (1, layers) or concept.embeddings.shape[2] != width:
        problems.append(
            f"tensor '{EMBEDDINGS}': this base has {layers} layers of width {width}, found {tuple(concept.embeddings.shape[1:])}"
        )
        return problems + layer_problems(concept.deltas, pipeline)
    for encoder, part in zip(text_encoders(pipeline), of_encoders(pipeline, concept.embeddings), strict=True):
        usual = encoder.table.norm(dim=-1).mean()
        if (longest := part.norm(dim=-1).max()) > LARGEST_EMBEDDING * usual:
            problems.append(
                f"tensor '{EMBEDDINGS}': length {longest:.3g}, the base's words have {usual:.3g} on average"
            )
    return problems + layer_problems(concept.deltas, pipeline)


def raise_if(problems: Sequence[str], name: str) -> None:
    """Raise ConceptFileError with the first of the problems of the file `name`, if there are any."""
    if problems:
        raise ConceptFileError(f"{name}: {listed(problems)}")
