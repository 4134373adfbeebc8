"""Loading as diffusers does: the options of pipelines, and concepts one by one, as LoRAs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Final

from mixofshow.concepts.adapters import summed_weights
from mixofshow.concepts.changes import Change
from mixofshow.concepts.concept import Concept
from mixofshow.concepts.interchange.importing import as_concept
from mixofshow.concepts.model import ConceptModel, with_words
from mixofshow.errors import BadInputError, SettingsError, nearest, require, shown

LOADING: Final = ("base", "device", "dtype", "variant", "config", "download")
"""Options of `load_model`, which `from_pretrained` takes too."""
_FETCH: Final = "fetch the model with it by huggingface_hub.snapshot_download, and give that folder"
NOT_LOADING: Final[Mapping[str, str]] = {
    **dict.fromkeys(("revision", "cache_dir", "token", "force_download", "proxies"), _FETCH),
    "device_map": "give one device (device=…), or enable_model_cpu_offload() once it is loaded",
}
"""Options of diffusers' `from_pretrained` that are taken only where they say nothing, and what to do instead."""


def loading_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained`, diffusers' among them, as those of `load_model`. Raises SettingsError for others."""
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    if "local_files_only" in options:
        options["download"] = not options.pop("local_files_only")
    if options.get("device_map") in ("cpu", "cuda"):
        options["device"] = options.pop("device_map")
    for as_ever in ("use_safetensors", "low_cpu_mem_usage"):  # nothing else is read, nor more memory taken
        options.pop(as_ever, None)
    for unused in ("safety_checker", "requires_safety_checker", "feature_extractor"):
        if not options.get(unused, True):  # as people write to be rid of it: there is none
            del options[unused]
    for option, way_out in NOT_LOADING.items():
        if options.pop(option, None) is not None:
            raise SettingsError(f"from_pretrained: {option}: {way_out}")
    for option in options:
        if option not in LOADING:
            raise SettingsError(f"from_pretrained: unknown option '{shown(option)}'{nearest(option, LOADING)}")
    return options


class ConceptLoaderMixin:
    """What diffusers' LoRA loader is for LoRAs: `load_concept`, `set_concepts`, `unload_concepts`."""

    _strengths: Mapping[str, float] | None = None
    """Of concepts that were loaded one by one; None: the model came as it is."""
    _known: ConceptModel

    @property
    def model(self) -> ConceptModel:
        """The words and weights that it draws with, on its own modules."""
        return replace(self._known, pipeline=self)

    @model.setter
    def model(self, model: ConceptModel) -> None:
        """Kept without the pipeline, which would else refer to itself: when it goes, its weights go at once."""
        self._known = replace(model, pipeline=None)

    def load_concept(self, concept: str | Path | Concept, strength: float = 1.0) -> None:
        """A concept, or another tool's LoRA, beside those that are loaded: its words, and its change of the whole picture.

        How much of each the whole picture has is `set_concepts`'; in regions, with `regional_lora`, each draws as it was
        tuned. Raises ConceptFileError, TokenError, and BadInputError for a fused model, to which `fuse` adds.
        """
        strength = _number("load_concept", strength)
        if self.model.baked or (self.model.weights and self._strengths is None):
            raise BadInputError("load_concept: this model is fused; add the concept by fuse, or load it on the base")
        found = as_concept(concept, self)
        self._know([*self.model.concepts, found], {**(self._strengths or {}), found.info.name: strength})

    def set_concepts(self, names: str | Sequence[str], weights: float | Sequence[float] = 1.0) -> None:
        """Which loaded concepts change the whole picture, and how much, as `set_adapters`; the others' words stay known."""
        names = [names] if isinstance(names, str) else list(names)
        given = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
        strengths = [_number("set_concepts", one) for one in given]
        known = [one.info.name for one in self.model.concepts]
        require(self._strengths is not None or not names, "set_concepts", "none", "concepts from load_concept")
        require(set(names) <= set(known), "set_concepts", shown(", ".join(names)), f"some of {', '.join(known)}")
        require(len(set(names)) == len(names), "set_concepts", shown(", ".join(names)), "each name once")
        require(len(strengths) == len(names), "set_concepts", len(strengths), f"{len(names)} weights, one for each")
        self._know(self.model.concepts, dict(zip(names, strengths, strict=True)))

    def unload_concepts(self) -> None:
        """The base alone again, without the concepts that were loaded."""
        if self._strengths is not None:
            self._know((), {})

    def load_textual_inversion(self, *_: Any, **__: Any) -> None:
        """Refused: prompts would not know its words. Raises SettingsError."""
        raise SettingsError(
            "load_textual_inversion: load_concept(file) takes embeddings too, and prompts know their words"
        )

    def _know(self, concepts: Sequence[Concept], strengths: Mapping[str, float]) -> None:
        known = with_words(self, concepts)
        weights = summed_weights(self, _changes(known.concepts, strengths))
        self.model, self._strengths = replace(known, weights=weights), strengths

    def _without(self, model: ConceptModel, names: Collection[str]) -> ConceptModel:
        """The model without the weights of some of the loaded concepts."""
        if self._strengths is None or not names:
            return model
        rest = {name: strength for name, strength in self._strengths.items() if name not in names}
        return replace(model, weights=summed_weights(self, _changes(model.concepts, rest)))


def _number(name: str, strength: Any) -> float:
    holds = isinstance(strength, Real) and math.isfinite(strength)
    require(holds, name, shown(strength), "finite numbers as strengths")
    return float(strength)


def _changes(concepts: Sequence[Concept], strengths: Mapping[str, float]) -> list[tuple[Mapping[str, Change], float]]:
    return [(one.deltas, strengths[one.info.name]) for one in concepts if strengths.get(one.info.name)]
