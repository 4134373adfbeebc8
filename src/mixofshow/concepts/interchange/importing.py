"""Files of other tools as concepts: LoRA and its kin of any tool, textual inversions.

A LoRA without embeddings has trigger words: they become placeholders whose vectors are those of the trigger's tokens,
so that a prompt with the placeholders is, to the last bit, the prompt with the trigger.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from mixofshow.bases.families import family_of
from mixofshow.bases.layers import kind_of, layer
from mixofshow.bases.loading import base_name, fingerprint
from mixofshow.bases.weight_files import ORIGINAL
from mixofshow.concepts.changes import Change, LowRank, layer_problems
from mixofshow.concepts.concept import (
    CLIP_SKIP,
    METADATA_KEY,
    Concept,
    ConceptInfo,
    fitted,
    raise_if,
    read_concept,
    value_problems,
)
from mixofshow.concepts.interchange.adapter_keys import NO_WEIGHTS, LayerNames, layer_names, other_kind, split_key
from mixofshow.concepts.interchange.causes import other_base, other_prediction
from mixofshow.concepts.interchange.embeddings import Words, file_words, named, trigger_words
from mixofshow.concepts.interchange.kinds import change_of
from mixofshow.concepts.interchange.pickles import read_pickle
from mixofshow.concepts.interchange.scales import WEIGHTS, scales_of
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.errors import BadInputError, ConceptFileError, shown
from mixofshow.files import MAX_BYTES, is_pickle, parse_tensors
from mixofshow.reading import read_bytes

logger = logging.getLogger(__name__)

AS_USUAL: Final = ImportSettings()
LONGEST_NOTE: Final = 200
NOTES: Final = ("string_to_token/", "string_to_token.")
"""What a textual inversion says beside its vectors: ids of tokens."""
DIFFUSERS_WEIGHTS: Final = "pytorch_lora_weights"


def open_concept(
    path: str | Path, pipeline: Any, settings: ImportSettings = AS_USUAL, *, quiet: bool = False
) -> Concept:
    """A concept file, or a file of another tool as a concept on this base. Raises ConceptFileError or TokenError.

    With `quiet` its clip skip is not compared with the base's, which may yet follow it.
    """
    file = str(_in_folder(Path(path)))
    tensors, texts = _read(file)
    if METADATA_KEY in texts:
        concept = _renamed(read_concept(tensors, texts, file), settings, file)
    else:
        concept = _imported(tensors, texts, file, pipeline, settings)
    concept = fitted(concept, pipeline, file, quiet=quiet)
    concept = scaled(concept, unet=settings.unet_alpha, text_encoder=settings.text_encoder_alpha)
    raise_if(value_problems({name: tensor.float() for name, tensor in concept.tensors().items()}), file)
    return concept


def read_ahead(path: str | Path) -> Concept | None:
    """The concept in a file of ours; None for another tool's, which says only on a base what it is.

    It is read before a base is loaded, which takes longer. Raises ConceptFileError or TokenError.
    """
    file = str(_in_folder(Path(path)))
    tensors, texts = _read(file)
    return read_concept(tensors, texts, file) if METADATA_KEY in texts else None


def name_ahead(path: str | Path, settings: ImportSettings = AS_USUAL) -> str:
    """What the concept of another tool's file will be called, which is told without its base. Raises BadInputError."""
    file = str(_in_folder(Path(path)))
    tensors, _ = _read(file)
    rest = {key: tensor for key, tensor in tensors.items() if split_key(key) is None}
    words = _embedded_words(rest, file, settings, plain=len(rest) == len(tensors))
    if words is None:  # but triggers, which are ordinary words and name nothing
        return named((), 1, settings.model_copy(update={"words": None}), file)[0]
    return named(words.names, len(words.vectors), settings, file)[0]


def as_concept(concept: Concept | str | Path, pipeline: Any) -> Concept:
    """A concept as it is, or the one in a file of any tool. Raises BadInputError for what is neither."""
    if isinstance(concept, Concept):
        return concept
    if not isinstance(concept, str | Path):
        raise BadInputError(f"expected a concept or its file, found {shown(type(concept).__name__)}")
    return open_concept(concept, pipeline)


def scaled(concept: Concept, *, unet: float = 1.0, text_encoder: float = 1.0) -> Concept:
    """The concept with its changes multiplied; its words stay."""
    if unet == text_encoder == 1:
        return concept
    deltas = {
        name: change.scaled(unet if kind_of(name) == "unet" else text_encoder)
        for name, change in concept.deltas.items()
    }
    return dataclasses.replace(concept, deltas=deltas)


def _in_folder(path: Path) -> Path:
    """Of a folder that peft or diffusers wrote the file of weights in it; else the path itself."""
    weights = (path / f"{name}.safetensors" for name in (WEIGHTS, DIFFUSERS_WEIGHTS))
    return next((one for one in weights if one.is_file()), path) if os.path.isdir(path) else path


def _read(file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    data = read_bytes(Path(file), MAX_BYTES)
    tensors, texts = read_pickle(data, file) if is_pickle(data) else parse_tensors(data, file)
    return {key: _in_usual_floats(one) for key, one in tensors.items() if not key.startswith(NOTES)}, texts


def _in_usual_floats(tensor: Tensor) -> Tensor:
    """Numbers of 8 bits, which are packed only, and of 64 as those of 32: what no arithmetic of a base is done in."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize in (1, 8) else tensor


def _renamed(concept: Concept, settings: ImportSettings, file: str) -> Concept:
    if not (settings.name or settings.words):
        return concept
    _, words = named(concept.info.words, len(concept.info.words), settings, file)
    info = concept.info.model_copy(update={"name": settings.name or concept.info.name, "words": words})
    return dataclasses.replace(concept, info=info)


def _imported(
    tensors: Mapping[str, Tensor], texts: Mapping[str, str], file: str, pipeline: Any, settings: ImportSettings
) -> Concept:
    if ORIGINAL in tensors:
        raise ConceptFileError(f"{file}: a whole base model, nothing to make a concept of; it can be the base")
    raise_if(value_problems({key: one for key, one in tensors.items() if not key.endswith(".alpha")}), file)
    keys = {key: split_key(key) for key in tensors}
    rest = {key: tensors[key] for key, found in keys.items() if found is None}
    deltas = _changes({key: tensors[key] for key in tensors if key not in rest}, texts, file, pipeline)
    if deltas and (cause := other_prediction(texts, pipeline)):
        logger.warning("%s: it says that it was %s", file, cause)
    _say_scale({found[1] for found in keys.values() if found}, texts, file, settings)
    words = _embedded_words(rest, file, settings, plain=len(rest) == len(tensors))
    if not (words or deltas):
        raise ConceptFileError(f"{file}: neither a LoRA nor an embedding; there is nothing in it to take")
    words = words or trigger_words(texts, pipeline, settings, file)
    info = _info(words, deltas, texts, file=file, pipeline=pipeline, settings=settings)
    return Concept(info, words.vectors, deltas)


def _embedded_words(rest: Mapping[str, Tensor], file: str, settings: ImportSettings, *, plain: bool) -> Words | None:
    """The words in the `rest` of a file's tensors, which change nothing, or in the settings' own file of embeddings.

    Raises ConceptFileError. Only a `plain` file, without a LoRA, can be a table of tokens, whose keys are anything.
    """
    if kind := other_kind(rest):
        raise ConceptFileError(f"{file}: {kind}, which is not read; LoRA, LoCon, LoHa, LoKr, DoRA and full changes are")
    words = file_words(rest, file, plain=plain)
    if settings.embeddings:
        added, _ = _read(str(settings.embeddings))
        raise_if(value_problems(added), str(settings.embeddings))
        words = file_words(added, str(settings.embeddings), plain=True)
    return words


def _say_scale(parts: set[str], texts: Mapping[str, str], file: str, settings: ImportSettings) -> None:
    """Say that the scale of an adapter is a guess, where neither file, configuration nor settings tell it."""
    scaled_parts = parts - NO_WEIGHTS - {"alpha", "diff"}
    if scaled_parts and "alpha" not in parts and not scales_of(file, texts).said and not settings.says_scale:
        logger.warning(
            "%s: no alpha in it nor beside it: its changes are read at scale 1; `unet_alpha` and "
            "`text_encoder_alpha` set others",
            file,
        )


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
        settings=_settings(texts),
        license=texts.get("modelspec.license", "")[:LONGEST_NOTE] or None,
        author=texts.get("modelspec.author", "")[:LONGEST_NOTE] or None,
    )


def _settings(texts: Mapping[str, str]) -> dict[str, Any]:
    """What the file says that decides how it is drawn: kohya's clip skip counts from 1, ours and diffusers' from 0."""
    try:
        skip = max(int(texts.get("ss_clip_skip", 1)) - 1, 0)
    except ValueError:  # "None"
        skip = 0
    return {CLIP_SKIP: skip} if skip else {}


def _changes(tensors: Mapping[str, Tensor], texts: Mapping[str, str], file: str, pipeline: Any) -> dict[str, Change]:
    """The adapter's changes by our layer names. What no concept can change is left out, with a warning.

    Raises ConceptFileError for what fits nowhere, with the cause where there is one.
    """
    names, scales = layer_names(pipeline), scales_of(file, texts)
    layers, problems = _by_layer(tensors, names)
    changes: dict[str, Change] = {}
    passed = []
    for name, parts in layers.items():
        passed += [name] if parts.keys() & NO_WEIGHTS else []
        if parts.keys() <= NO_WEIGHTS:
            continue
        if (ours := names.find(name)) is not None:
            try:
                weight = layer(pipeline, ours).weight
                changes[ours] = change_of(parts, partial(scales.of, ours, parts), weight)  # type: ignore[arg-type]
            except ValueError as error:
                problems.append(f"layer '{ours}': {error}")
        elif names.knows(name):
            passed.append(name)
        else:
            problems.append(f"layer '{shown(name)}' is not in this base")
    problems += layer_problems(changes, pipeline)
    cause = other_base(texts, layers, pipeline)
    raise_if([cause] if problems and cause else problems, file)
    if cause:
        logger.warning("%s: it says that it was %s", file, cause)
    if silent := [name for name, change in changes.items() if change.is_nothing]:
        nothing = "%s: %d of %d layers change nothing, their alpha or their weights being 0, as %s"
        logger.warning(nothing, file, len(silent), len(changes), shown(silent[0]))
    if passed:
        left_out = "%s: %d layers left out that no concept can change (biases, norms), as %s"
        logger.warning(left_out, file, len(passed), shown(passed[0]))
    return changes


def _by_layer(tensors: Mapping[str, Tensor], names: LayerNames) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each layer, which is called by the first of its names in the file, and what is there twice."""
    layers: dict[str, dict[str, Tensor]] = {}
    called: dict[str, str] = {}
    problems = []
    for key, tensor in tensors.items():
        found = split_key(key)
        if found is None:
            continue
        name, part = found
        name = called.setdefault(names.find(name) or name, name)
        if part in layers.setdefault(name, {}):
            problems.append(f"tensor '{shown(key)}' is there twice, under two names")
        layers[name][part] = tensor
    return layers, problems
