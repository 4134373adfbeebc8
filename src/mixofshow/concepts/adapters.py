"""Putting weight changes onto a base model and taking them off again, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixofshow.bases.layers import layer, matrix, tunable_layers
from mixofshow.bases.parts import adapters, exclusive, parameter_of, plain, refuse_streamed
from mixofshow.concepts.changes import Change, LowRank
from mixofshow.concepts.concept import Concept
from mixofshow.errors import BaseModelError, shown


@contextlib.contextmanager
def replaced(pipeline: Any, weights: Mapping[str, Tensor], *, parked: bool = False) -> Iterator[None]:
    """Inside, the named layers have these weights, (out, in); afterwards their own again. Nothing is copied meanwhile.

    But their own may be `parked` on the CPU, for the sake of an accelerator's memory. One thread at a time. Raises
    BaseModelError where a weight is out of reach, as by offloading.
    """
    for part in dict.fromkeys(name.split(".", 1)[0] for name in weights):
        refuse_streamed(plain(getattr(pipeline, part)), part)
    with exclusive(pipeline):
        parameters: dict[str, Any] = {name: parameter_of(layer(pipeline, name)) for name in weights}
        own = {name: parameter.data for name, parameter in parameters.items()}
        if parked:
            own = {name: weight.cpu() for name, weight in own.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = weights[name].detach().to(parameter).view_as(parameter)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name].to(parameter.device)  # a part that is offloaded may have been moved


def tuned_weights(pipeline: Any, concept: Concept, names: Collection[str], strength: float = 1.0) -> dict[str, Tensor]:
    """The concept's own weights, W0 + strength · ΔW, of the named layers (those it did not change: W0)."""
    deltas = {name: concept.deltas[name] for name in names if name in concept.deltas}
    return summed_weights(pipeline, [(deltas, strength)], names)


@torch.no_grad()
def summed_weights(
    pipeline: Any, tuned: Iterable[tuple[Mapping[str, Change], float]], names: Iterable[str] = ()
) -> dict[str, Tensor]:
    """W0 + Σ strength · ΔW of every layer that is changed, and of the named ones, while the pipeline has base weights."""
    weights: dict[str, Tensor] = {}
    with exclusive(pipeline):
        for deltas, strength in ((dict.fromkeys(names), 1.0), *tuned):
            for name, change in deltas.items():
                own = weights.setdefault(name, matrix(layer(pipeline, name)).clone())
                if change is not None:
                    own += change.matrix(strength).to(own)
    return weights


def attached_changes(pipeline: Any, adapter: str) -> dict[str, Change]:
    """What an adapter of peft's (a LoRA that diffusers loaded) changes of the base, by our layer names, as it is scaled.

    Raises BaseModelError for a kind that is more than two factors, or others.
    """
    _require_two_factors(pipeline, adapter)
    changes: dict[str, Change] = {}
    for name in tunable_layers(pipeline):
        module: Any = layer(pipeline, name)
        if adapter not in getattr(module, "lora_A", ()):
            continue
        down, up = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        changes[name] = LowRank.of(down, module.scaling[adapter] * up)
    return changes


def _require_two_factors(pipeline: Any, adapter: str) -> None:
    for part in _modules(pipeline):
        config = (getattr(part, "peft_config", None) or {}).get(adapter)
        if config is None:
            continue
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA" or config.use_dora:
            kind = "DoRA" if kind == "LORA" else kind
            raise BaseModelError(
                f"adapter '{shown(adapter)}': a {shown(kind)}, which no region can have to itself; convert its file to a "
                "concept, which is exact"
            )
        if config.lora_bias:
            raise BaseModelError(
                f"adapter '{shown(adapter)}': a LoRA with biases, which no region can have to itself; leave it active for "
                "the whole picture, or tune it with lora_bias=False"
            )


@contextlib.contextmanager
def silenced(pipeline: Any, names: Iterable[str]) -> Iterator[None]:
    """Inside, the named adapters of peft's add nothing, whichever are active."""
    asked = set(names) & set(adapters(pipeline))
    parts = _modules(pipeline) if asked else []
    scaled = [(module.scaling, name) for part in parts for module in part.modules() for name in asked & _scaled(module)]
    before = [scaling[name] for scaling, name in scaled]
    try:
        for scaling, name in scaled:
            scaling[name] = 0.0
        yield
    finally:
        for (scaling, name), own in zip(scaled, before, strict=True):
            scaling[name] = own


def _modules(pipeline: Any) -> list[Any]:
    return [plain(part) for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _scaled(module: Any) -> set[str]:
    return set(module.scaling) if hasattr(module, "lora_A") else set()
