"""What each tuning method trains: the concept's words, and adapters on layers of a frozen base.

method             words                     vectors    adapters
ed-lora            random, class word        per layer  LoRA in text encoder and UNet    Mix-of-Show §3.2
lora               random, class word        one        LoRA in text encoder and UNet    Hu et al. 2021
p-plus             class word                per layer  none                             P+, Voynov et al. 2023
textual-inversion  class word                one        none                             Gal et al. 2022
custom-diffusion   random, fixed class word  one        keys, values of cross-attention  Kumari et al. 2023
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import torch
from einops import repeat
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixofshow.bases.families import text_encoders, token_width
from mixofshow.bases.layers import count_groups, kind_of, lora_layers, matrix, module_path
from mixofshow.concepts.changes import Change, Full, LowRank
from mixofshow.errors import SettingsError, TokenError, shown
from mixofshow.tuning.settings import LoraSettings, TuningSettings

ADAPTER: Final = "concept"
Start = Literal["random", "class"]


class Adapter(Protocol):
    """The change of one layer, while it is trained."""

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""

    def enable(self, on: bool) -> None:
        """Switch the change off and on again."""

    def finished(self, *, compact: bool = True) -> Change:
        """The change as a concept holds it; `compact` looks for factors that say the same in less, which takes long."""


Adapters = Mapping[str, Adapter]
"""By our layer names."""


@contextlib.contextmanager
def switched_off(adapters: Iterable[Adapter]) -> Iterator[None]:
    """Inside, these layers are the base's."""
    adapters = list(adapters)
    for adapter in adapters:
        adapter.enable(False)
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enable(True)


def keys_and_values(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Those of cross-attention."""
    return {name: found for name, found in layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}


def _stored(tensor: Tensor) -> Tensor:
    """In half precision, as the file holds it: rounding here makes the concept in memory the one in the file."""
    return tensor.detach().cpu().half().float()


class _LoraAdapter:
    """A layer that peft has wrapped. Where a down matrix (rank, in) is given, that stays as it is.

    The factors are in single precision, whatever the layer is in: an optimizer's steps are smaller than half tells.
    """

    def __init__(self, wrapper: Any, alpha: float, down: Tensor | None = None) -> None:
        self.wrapper, self.alpha, self.fixed = wrapper, alpha, down is not None
        self.down, self.up = wrapper.lora_A[ADAPTER].weight, wrapper.lora_B[ADAPTER].weight
        for factor in (self.down, self.up):
            factor.data = factor.data.float()
        if down is not None:
            self.down.data.copy_(down.view_as(self.down))
            self.enable(True)

    def parameters(self) -> list[nn.Parameter]:
        return [self.up] if self.fixed else [self.down, self.up]

    def enable(self, on: bool) -> None:
        self.wrapper.enable_adapters(on)
        if self.fixed:
            self.down.requires_grad_(False)  # peft lets all of an adapter be trained that it enables

    def finished(self, *, compact: bool = True) -> LowRank:
        return LowRank.of(_stored(self.down), _stored(self.alpha * self.up))


def _shared_rows(layer: str, width: int, own: LoraSettings) -> Tensor | None:
    """Rows [k·rank : (k+1)·rank] of the layer's orthogonal basis (width, width), k being the slice; None without one.

    The basis is drawn by the layer's name, so that all clients have the same: then the changes of concepts with
    different slices cannot meet (Orthogonal Adaptation, Po et al. 2023, arXiv:2312.02432). Raises SettingsError.
    """
    if own.orthogonal_slice is None:
        return None
    first, last = own.orthogonal_slice * own.rank, (own.orthogonal_slice + 1) * own.rank
    if last > width:
        raise SettingsError(
            f"orthogonal_slice: {own.orthogonal_slice} at rank {own.rank} needs {last} inputs, layer '{layer}' has "
            f"{width}; choose a smaller slice or rank"
        )
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(layer.encode()).digest()[:8]))
    # Gram-Schmidt: later rows change nothing of earlier ones, so they need not be drawn.
    drawn = torch.stack([torch.randn(width, generator=generator, dtype=torch.float64) for _ in range(last)])
    basis, triangle = torch.linalg.qr(drawn.T)
    return (basis * triangle.diagonal().sign()).T[first:]


def _lora_config(ranks: Mapping[str, int], own: LoraSettings) -> LoraConfig:
    """Of the layers of one part, by path, each with its rank."""
    small = {} if own.orthogonal_slice is not None else {path: rank for path, rank in ranks.items() if rank < own.rank}
    return LoraConfig(
        r=own.rank,
        lora_alpha=own.alpha * own.rank,  # type: ignore[arg-type]  # peft scales by lora_alpha / r, the reference by alpha
        target_modules=list(ranks),
        rank_pattern={re.escape(path): rank for path, rank in small.items()},
        alpha_pattern={re.escape(path): own.alpha * rank for path, rank in small.items()},
    )


@contextlib.contextmanager
def lora_adapters(pipeline: Any, settings: TuningSettings) -> Iterator[Adapters]:
    """Inside, the layers that the settings aim at are wrapped by peft; yields them. Afterwards all is as before."""
    layers = lora_layers(pipeline, unet=settings.unet.targets, text_encoder=settings.text_encoder.targets)
    own: dict[str, LoraSettings] = {name: getattr(settings, kind_of(name)) for name in layers}
    downs = {name: _shared_rows(name, matrix(module).shape[1], own[name]) for name, module in layers.items()}
    places = {name: module_path(pipeline, name) for name in layers}
    parts: dict[str, dict[str, str]] = {}
    for name, (part, path) in places.items():
        parts.setdefault(part, {})[path] = name
    try:
        for part, names in parts.items():
            # A layer that has fewer inputs or outputs than the rank gets as many: more say nothing.
            ranks = {path: min(own[name].rank, *matrix(layers[name]).shape) for path, name in names.items()}
            config = _lora_config(ranks, own[next(iter(names.values()))])
            inject_adapter_in_model(config, getattr(pipeline, part), ADAPTER)
        yield {
            name: _LoraAdapter(getattr(pipeline, part).get_submodule(path), own[name].alpha, downs[name])
            for name, (part, path) in places.items()
        }
    finally:
        for part, names in parts.items():
            model = getattr(pipeline, part)
            for path in names:
                module = model.get_submodule(path)
                model.set_submodule(path, getattr(module, "base_layer", module))
            if hasattr(model, "peft_config"):
                del model.peft_config


class _Sum(nn.Module):
    """A weight and what is added to it whenever it is read, in single precision."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.on = True

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return (weight + self.change).to(weight) if self.on else weight


class _FullAdapter:
    """A layer whose weight has a change of full rank."""

    def __init__(self, layer: nn.Module) -> None:
        self.sum = _Sum(layer.weight)  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", self.sum)

    def parameters(self) -> list[nn.Parameter]:
        return [self.sum.change]

    def enable(self, on: bool) -> None:
        self.sum.on = on

    def finished(self, *, compact: bool = True) -> Change:
        """Low-rank where that says the same in less, else as it is."""
        change = _stored(self.sum.change)
        return (_factors(change) if compact else None) or Full(change)


def _factors(change: Tensor) -> LowRank | None:
    """Two factors whose product is the change to half precision, if they are smaller than it."""
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    outputs, inputs = change.shape
    for rank in range(1, outputs * inputs // (outputs + inputs) + 1):
        # What is left out must be below half precision's rounding of the rest.
        if values[rank:].norm() <= torch.finfo(torch.float16).eps / 2 * values[:rank].norm():
            root = values[:rank].sqrt()
            return LowRank(_stored(root[:, None] * right[:rank]), _stored(left[:, :rank] * root))
    return None


@contextlib.contextmanager
def full_keys_and_values(pipeline: Any, settings: TuningSettings) -> Iterator[Adapters]:
    """Inside, cross-attention's keys and values each have a change of full rank; yields them (Custom Diffusion §3.1)."""
    layers = keys_and_values(lora_layers(pipeline))
    try:
        yield {name: _FullAdapter(module) for name, module in layers.items()}
    finally:
        for module in layers.values():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


@dataclass(frozen=True)
class TuningMethod:
    """The concept's words by how they start, how many of them (the first) move, and what else is trained."""

    starts: tuple[Start, ...]
    layerwise: bool
    adapters: Callable[[Any, TuningSettings], AbstractContextManager[Adapters]]
    moving: int | None = None


METHODS: Final = {
    "ed-lora": TuningMethod(("random", "class"), True, lora_adapters),
    "lora": TuningMethod(("random", "class"), False, lora_adapters),
    "p-plus": TuningMethod(("class",), True, lambda pipeline, settings: contextlib.nullcontext({})),
    "textual-inversion": TuningMethod(("class",), False, lambda pipeline, settings: contextlib.nullcontext({})),
    "custom-diffusion": TuningMethod(("random", "class"), False, full_keys_and_values, moving=1),
}


def word_names(settings: TuningSettings) -> tuple[str, ...]:
    """The concept's words: `<name>` alone, or `<name1> <name2>`, for which `<name>` then stands."""
    count = len(METHODS[settings.method].starts)
    if count == 1:
        return (settings.placeholder,)
    return tuple(f"<{settings.name}{number}>" for number in range(1, count + 1))


def initializers(settings: TuningSettings) -> tuple[str, ...]:
    """What each word starts as: "random" or the class word."""
    return tuple(settings.class_word if start == "class" else start for start in METHODS[settings.method].starts)


def class_vector(pipeline: Any, class_word: str) -> Tensor:
    """The base's own vector of the class word, (dim,), of all text encoders together. Raises TokenError."""
    encoders = text_encoders(pipeline)
    return torch.cat([one.table[class_token(one.tokenizer, class_word)].detach().float() for one in encoders])


def class_token(tokenizer: Any, class_word: str) -> int:
    """The token id of the class word; of several tokens the last, as "officer" of "police officer". Raises TokenError."""
    ids = tokenizer(class_word, add_special_tokens=False).input_ids
    if not ids or ids[-1] in (tokenizer.eos_token_id, tokenizer.unk_token_id):
        raise TokenError(f"class word '{shown(class_word)}' means nothing to this base model; choose a word it knows")
    return int(ids[-1])


class PlaceholderEmbeddings(nn.Module):
    """The vectors of the concept's words; calling it gives all of them, (layers or 1, words, dim)."""

    def __init__(self, vectors: Tensor, moving: int) -> None:
        super().__init__()
        self.moving = nn.Parameter(vectors[:, :moving].clone())
        self.register_buffer("fixed", vectors[:, moving:].clone())

    def forward(self) -> Tensor:
        """(layers or 1, words, dim)."""
        return torch.cat([self.moving, self.fixed], dim=1)  # type: ignore[list-item]


def initial_words(pipeline: Any, settings: TuningSettings, generator: torch.Generator) -> PlaceholderEmbeddings:
    """The words as they start, equal in all layers."""
    method = METHODS[settings.method]
    known = class_vector(pipeline, settings.class_word)
    starts = [
        settings.words.sigma * torch.randn(token_width(pipeline), generator=generator).to(known)
        if start == "random"
        else known
        for start in method.starts
    ]
    layers = count_groups(pipeline.unet) if method.layerwise else 1
    vectors = repeat(torch.stack(starts), "words dim -> layers words dim", layers=layers)
    return PlaceholderEmbeddings(vectors, len(starts) if method.moving is None else method.moving)
