"""Weights that are trained: put beside a frozen base for the time of tuning, and taken off again without a trace."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixofshow.bases.layers import kind_of, lora_layers, matrix, module_path
from mixofshow.concepts.changes import Change, Full, LowRank
from mixofshow.errors import SettingsError
from mixofshow.tuning.settings import TextEncoderSettings, TuningSettings, UNetSettings

ADAPTER: Final = "concept"


class TrainedChange(Protocol):
    """The change of one layer, while it is trained."""

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""

    def enable(self, on: bool) -> None:
        """Switch the change off and on again."""

    def finished(self) -> Change:
        """The change as a concept holds it."""


Changes = Mapping[str, TrainedChange]
"""By our layer names."""


@contextlib.contextmanager
def switched_off(changes: Iterable[TrainedChange]) -> Iterator[None]:
    """Inside, these layers are the base's."""
    changes = list(changes)
    for change in changes:
        change.enable(False)
    try:
        yield
    finally:
        for change in changes:
            change.enable(True)


def keys_and_values(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Those of cross-attention."""
    return {name: found for name, found in layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}


def _stored(tensor: Tensor) -> Tensor:
    """In half precision, as the file holds it: rounding here makes the concept in memory the one in the file."""
    return tensor.detach().cpu().half().float()


class _LowRankChange:
    """A layer that peft has wrapped. Where a down matrix (rank, in) is given, that stays as it is.

    The factors are in single precision, whatever the layer is in: an optimizer's steps are smaller than half tells.
    """

    def __init__(self, wrapper: Any, alpha: float, down: Tensor | None = None) -> None:
        self.wrapper, self.alpha, self.fixed = wrapper, alpha, down is not None
        for factor in self._factors():
            factor.data = factor.data.float()
        if down is not None:
            own = self._factors()[0]
            own.data.copy_(down.view_as(own))
            self.enable(True)

    def _factors(self) -> list[nn.Parameter]:
        return [self.wrapper.lora_A[ADAPTER].weight, self.wrapper.lora_B[ADAPTER].weight]

    def parameters(self) -> list[nn.Parameter]:
        return self._factors()[1:] if self.fixed else self._factors()

    def enable(self, on: bool) -> None:
        self.wrapper.enable_adapters(on)
        if self.fixed:
            self._factors()[0].requires_grad_(False)  # peft lets all of an adapter be trained that it enables

    def finished(self) -> LowRank:
        down, up = self._factors()
        return LowRank.of(_stored(down), _stored(self.alpha * up))


def _shared_rows(layer: str, width: int, own: TextEncoderSettings | UNetSettings) -> Tensor | None:
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


def _lora(
    layers: Mapping[str, nn.Module], own: TextEncoderSettings | UNetSettings, paths: Mapping[str, tuple[str, str]]
) -> LoraConfig:
    """Of the layers of one part. A layer that has fewer inputs or outputs than the rank gets as many: more say nothing."""
    ranks = {paths[name][1]: min(own.rank, *matrix(module).shape) for name, module in layers.items()}
    small = {} if own.orthogonal_slice is not None else {path: r for path, r in ranks.items() if r < own.rank}
    return LoraConfig(
        r=own.rank,
        lora_alpha=own.alpha * own.rank,  # type: ignore[arg-type]  # peft scales by lora_alpha / r, the reference by alpha
        target_modules=list(ranks),
        rank_pattern={re.escape(path): rank for path, rank in small.items()},
        alpha_pattern={re.escape(path): own.alpha * rank for path, rank in small.items()},
    )


@contextlib.contextmanager
def low_rank_layers(pipeline: Any, settings: TuningSettings) -> Iterator[Changes]:
    """Inside, the layers that the settings aim at are wrapped by peft; yields them. Afterwards all is as before."""
    kinds: dict[str, TextEncoderSettings | UNetSettings] = {
        "text_encoder": settings.text_encoder,
        "unet": settings.unet,
    }
    layers = lora_layers(pipeline, unet=settings.unet.targets, text_encoder=settings.text_encoder.targets)
    paths = {name: module_path(pipeline, name) for name in layers}
    downs = {name: _shared_rows(name, matrix(module).shape[1], kinds[kind_of(name)]) for name, module in layers.items()}
    parts = dict.fromkeys(part for part, _ in paths.values())
    try:
        for part in parts:
            config = _lora(
                {name: layers[name] for name, (of, _) in paths.items() if of == part}, kinds[kind_of(f"{part}.")], paths
            )
            inject_adapter_in_model(config, getattr(pipeline, part), ADAPTER)
        yield {
            name: _LowRankChange(getattr(pipeline, part).get_submodule(path), kinds[kind_of(name)].alpha, downs[name])
            for name, (part, path) in paths.items()
        }
    finally:
        for part, path in paths.values():
            module = getattr(pipeline, part).get_submodule(path)
            getattr(pipeline, part).set_submodule(path, getattr(module, "base_layer", module))
        for part in parts:
            if hasattr(getattr(pipeline, part), "peft_config"):
                del getattr(pipeline, part).peft_config


class _Sum(nn.Module):
    """A weight and what is added to it whenever it is read, in single precision."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.on = True

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return (weight + self.change).to(weight) if self.on else weight


class _FullChange:
    """A layer whose weight has a change of full rank."""

    def __init__(self, layer: nn.Module) -> None:
        self.sum = _Sum(layer.weight)  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", self.sum)

    def parameters(self) -> list[nn.Parameter]:
        return [self.sum.change]

    def enable(self, on: bool) -> None:
        self.sum.on = on

    def finished(self) -> Change:
        """Low-rank where that says the same in less, else as it is."""
        change = _stored(self.sum.change)
        return _factors(change) or Full(change)


@contextlib.contextmanager
def full_keys_and_values(pipeline: Any, settings: TuningSettings) -> Iterator[Changes]:
    """Inside, cross-attention's keys and values each have a change of full rank; yields them (Custom Diffusion §3.1)."""
    layers = keys_and_values(lora_layers(pipeline))
    try:
        yield {name: _FullChange(module) for name, module in layers.items()}
    finally:
        for module in layers.values():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


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
