"""Files of other tools as concepts: LoRA of Mix-of-Show's own code, kohya, diffusers and peft; textual inversions.

A LoRA without embeddings has trigger words: they become placeholders whose vectors are those of the trigger's tokens,
so that a prompt with the placeholders is, to the last bit, the prompt with the trigger.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from mixofshow.bases.families import family_of
from mixofshow.bases.layers import kind_of
from mixofshow.bases.loading import base_name, fingerprint
from mixofshow.concepts.changes import Change, Full, LowRank
from mixofshow.concepts.concept import (
    METADATA_KEY,
    Concept,
    ConceptInfo,
    check_fits,
    raise_if,
    read_concept,
    value_problems,
)
from mixofshow.concepts.interchange.embeddings import Words, file_words, named, trigger_words
from mixofshow.concepts.interchange.keys import Half, layer_names, split_key
from mixofshow.concepts.interchange.pickles import read_pickle
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.errors import ConceptFileError, shown
from mixofshow.files import is_pickle, parse_tensors
from mixofshow.reading import parse_json, read_bytes

logger = logging.getLogger(__name__)

AS_USUAL: Final = ImportSettings()
ADAPTER_METADATA: Final = "lora_adapter_metadata"
"""Where diffusers notes peft's configuration, each key with its part in front, as `unet.lora_alpha`."""
LONGEST_NOTE: Final = 200

Halves = dict[Half, Tensor]


def open_concept(path: str | Path, pipeline: Any, settings: ImportSettings = AS_USUAL) -> Concept:
    """A concept file, or a file of another tool as a concept on this base. Raises ConceptFileError or TokenError."""
    file = str(path)
    tensors, texts = _read(file)
    if METADATA_KEY in texts:
        concept = _renamed(read_concept(tensors, texts, file, pipeline), settings, file)
    else:
        concept = _imported(tensors, texts, file, pipeline, settings)
    concept = scaled(concept, unet=settings.unet_alpha, text_encoder=settings.text_encoder_alpha)
    raise_if(value_problems({name: tensor.float() for name, tensor in concept.tensors().items()}), file)
    return concept


def scaled(concept: Concept, *, unet: float = 1.0, text_encoder: float = 1.0) -> Concept:
    """The concept with its changes multiplied; its words stay."""
    if unet == text_encoder == 1:
        return concept
    deltas = {
        name: change.scaled(unet if kind_of(name) == "unet" else text_encoder)
        for name, change in concept.deltas.items()
    }
    return dataclasses.replace(concept, deltas=deltas)


def _read(file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    data = read_bytes(Path(file))
    return read_pickle(data, file) if is_pickle(data) else parse_tensors(data, file)


def _renamed(concept: Concept, settings: ImportSettings, file: str) -> Concept:
    if not (settings.name or settings.words):
        return concept
    _, words = named(concept.info.words, len(concept.info.words), settings, file)
    info = concept.info.model_copy(update={"name": settings.name or concept.info.name, "words": words})
    return dataclasses.replace(concept, info=info)


def _imported(
    tensors: Mapping[str, Tensor], texts: Mapping[str, str], file: str, pipeline: Any, settings: ImportSettings
) -> Concept:
    raise_if(value_problems({key: one for key, one in tensors.items() if not key.endswith(".alpha")}), file)
    keys = {key: split_key(key) for key in tensors}
    rest = {key: tensors[key] for key, found in keys.items() if found is None}
    deltas = _changes({key: tensors[key] for key in tensors if key not in rest}, texts, file, pipeline)
    # Only a file without a LoRA can be a plain table of tokens, whose keys are anything.
    words = file_words(rest, file, plain=len(rest) == len(tensors))
    if settings.embeddings:
        added, _ = _read(str(settings.embeddings))
        raise_if(value_problems(added), str(settings.embeddings))
        words = file_words(added, str(settings.embeddings), plain=True)
    if not (words or deltas):
        raise ConceptFileError(f"{file}: neither a LoRA nor an embedding; there is nothing in it to take")
    words = words or trigger_words(texts, pipeline, settings, file)
    concept = Concept(
        _info(words, deltas, texts, file=file, pipeline=pipeline, settings=settings), words.vectors, deltas
    )
    check_fits(concept, pipeline, file)
    return concept


def _info(
    words: Words,
    deltas: Mapping[str, Change],
    texts: Mapping[str, str],
    *,
    file: str,
    pipeline: Any,
    settings: ImportSettings,
) -> ConceptInfo:
    """Raises ConceptFileError or TokenError for words that a concept cannot have."""
    words.check_fits(pipeline, file)
    # Trigger words are ordinary ones, and no names for placeholders.
    given = settings.model_copy(update={"words": None}) if words.initializers else settings
    name, placeholders = named(words.names, len(words.vectors), given, file)
    layers = words.vectors.shape[1]
    methods = {True: ("lora", "ed-lora"), False: ("textual-inversion", "p-plus")}
    return ConceptInfo(
        name=name,
        words=placeholders,
        class_word=settings.class_word,
        initializers=words.initializers or ("unknown",) * len(placeholders),
        layers=layers,
        family=family_of(pipeline).name,
        base=base_name(pipeline),
        base_fingerprint=fingerprint(pipeline),
        method=methods[bool(deltas)][layers > 1],
        rank=max((one.down.shape[0] for one in deltas.values() if isinstance(one, LowRank)), default=0),
        license=texts.get("modelspec.license", "")[:LONGEST_NOTE] or None,
        author=texts.get("modelspec.author", "")[:LONGEST_NOTE] or None,
    )


def _changes(tensors: Mapping[str, Tensor], texts: Mapping[str, str], file: str, pipeline: Any) -> dict[str, Change]:
    """The LoRA's changes by our layer names. Layers that no concept can change are left out, with a warning."""
    names, configs = layer_names(pipeline), _adapter_configs(texts, file)
    halves, problems = _by_layer(tensors)
    changes: dict[str, Change] = {}
    passed = []
    for layer, parts in halves.items():
        if (ours := names.find(layer)) is not None:
            try:
                changes[ours] = _change(ours, parts, configs)
            except ValueError as error:
                problems.append(f"layer '{ours}': {error}")
        elif names.knows(layer):
            passed.append(layer)
        else:
            problems.append(f"layer '{shown(layer)}' is not in this base")
    raise_if(problems, file)
    if passed:
        logger.warning(
            "%s: %d layers left out that no concept can change, as %s",
            file,
            len(passed),
            shown(passed[0]),
        )
    return changes


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Halves], list[str]]:
    halves: dict[str, Halves] = {}
    problems = []
    for key, tensor in tensors.items():
        found = split_key(key)
        if found is None:
            continue
        layer, half = found
        if half in halves.setdefault(layer, {}):
            problems.append(f"tensor '{shown(key)}' is there twice, under two names")
        halves[layer][half] = tensor
    return halves, problems


def _change(layer: str, parts: Halves, configs: Mapping[str, Mapping[str, Any]]) -> Change:
    """The change that two halves make, alpha and rank in `up`. Raises ValueError."""
    if "mid" in parts or "down" not in parts or "up" not in parts:
        raise ValueError(f"expected a lower and an upper half, found {', '.join(sorted(parts))}")
    halves = LowRank.of(parts["down"].float(), parts["up"].float())
    rank = len(halves.down)
    change = halves.scaled(_alpha(parts["alpha"]) / rank if "alpha" in parts else _configured(layer, rank, configs))
    if rank > min(change.shape):
        return Full(change.matrix(), change.kernel)
    return _balanced(change)


def _alpha(tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor)):
        raise ValueError("expected alpha to be one finite number")
    return alpha


def _balanced(change: LowRank) -> LowRank:
    """Both halves about equally large, by a power of two, which is exact: in a file's half precision neither fades."""
    sizes = float(change.down.abs().max()), float(change.up.abs().max())
    if min(sizes) == 0:
        return change
    shift = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    return LowRank(change.down * shift, change.up / shift, change.kernel)


def _adapter_configs(texts: Mapping[str, str], file: str) -> dict[str, dict[str, Any]]:
    """What diffusers noted of peft's configuration, by part of the pipeline."""
    table = parse_json(texts.get(ADAPTER_METADATA, "{}"), f"{file}: metadata '{ADAPTER_METADATA}'", ConceptFileError)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in table.items() if isinstance(table, dict) else ():
        part, _, field = key.partition(".")
        configs.setdefault(part, {})[field] = value
    return configs


def _configured(layer: str, rank: int, configs: Mapping[str, Mapping[str, Any]]) -> float:
    """The scale of a layer without an alpha of its own: as in peft's configuration, or 1. Raises ValueError."""
    part, path = layer.split(".", 1)
    config = configs.get(part, {})
    alpha, patterns = config.get("lora_alpha", rank), config.get("alpha_pattern", {})
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if f".{path}".endswith("." + pattern.removeprefix("^")):
            alpha = value
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"expected lora_alpha to be a finite number, found {shown(alpha)}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
