"""The parts of a pipeline as they were made, and what others put around them: compilation, adapters, offloading, threads."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mixofshow.errors import BaseModelError, shown
from mixofshow.files import raw

_LOCKS: Final[WeakKeyDictionary[nn.Module, threading.RLock]] = WeakKeyDictionary()
_NEW_LOCK: Final = threading.Lock()
GLIMPSED: Final = 1024
"""Numbers of a tensor that tell whether it is still the same."""
_WRAPPED: Final = re.compile(r"\.(base_layer|parametrizations)(?=\.)|(?<=\.weight)\.original$")
_ATTACHED: Final = re.compile(r"\.lora_|\.parametrizations\.\w+\.\d|\.to_(added_)?q?kv\.")
"""What adapters, parametrizations and fused projections put beside a layer's own weights."""


def plain(module: Any) -> Any:
    """The module itself, without what `torch.compile` puts around it, which renames everything inside."""
    return getattr(module, "_orig_mod", module)


@contextlib.contextmanager
def exclusive(pipeline: Any) -> Iterator[None]:
    """Inside, no other thread is inside for a pipeline with the same UNet; it is lent weights and processors for a while."""
    with _NEW_LOCK:
        lock = _LOCKS.setdefault(plain(pipeline.unet), threading.RLock())
    with lock:
        yield


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a part as it is without adapters, sorted by name. Raises BaseModelError where one is offloaded."""
    state = plain(module).state_dict()
    found = {_WRAPPED.sub("", name): tensor for name, tensor in state.items() if not _ATTACHED.search(name)}
    for name, tensor in sorted(found.items()):
        _refuse_meta(tensor, name)
        yield name, tensor


_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by their bytes."""


def glimpse(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hex digits that tell, as long as a program runs, whether tensors are as before.

    By where they are, the sum of all their bits, and some numbers as they stand: torch does not count what is changed
    through `.data`, be it one row of a table of words.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        version = 0 if tensor.is_inference() else tensor._version
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.data_ptr()} {version}".encode())
        flat = tensor.detach().flatten()
        digest.update(str(int(flat.view(_BITS[flat.element_size()]).sum())).encode())
        digest.update(raw(flat[:: max(1, len(flat) // GLIMPSED)]))
    return digest.hexdigest()


def adapters(pipeline: Any) -> list[str]:
    """The names of peft's adapters (LoRAs) that are attached to any part."""
    parts = [plain(part) for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return list(dict.fromkeys(name for part in parts for name in getattr(part, "peft_config", None) or ()))


def refuse_adapters(pipeline: Any, what: str) -> None:
    """Raise BaseModelError while adapters are attached, which `what` would lose, or take for the base's own."""
    if names := adapters(pipeline):
        raise BaseModelError(
            f"{what}: the pipeline has adapters attached ({shown(', '.join(names))}); take them off first by "
            "unload_lora_weights(), and load them again afterwards"
        )


def runs_on(part: nn.Module) -> torch.device:
    """Where a part computes; of one that is offloaded not where its weights wait meanwhile."""
    hooks = (getattr(module, "_hf_hook", None) for module in part.modules())
    found = next((place for one in hooks if (place := getattr(one, "execution_device", None)) is not None), None)
    return next(part.parameters()).device if found is None else torch.device(found)


def refuse_hooks(pipeline: Any, what: str) -> None:
    """Raise BaseModelError where accelerate moves parts to and fro, which neither training nor fusing follows."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if moved := [name for name, part in parts.items() if any(hasattr(one, "_hf_hook") for one in part.modules())]:
        raise BaseModelError(f"{what}: {', '.join(moved)}: offloaded; call remove_all_hooks() and to(device) before")


def parameter_of(module: Any) -> nn.Parameter:
    """A layer's own weight, also where something is added to it whenever it is read."""
    parametrized = getattr(module, "parametrizations", {})
    return parametrized["weight"].original if "weight" in parametrized else module.weight


def refuse_unreachable(module: Any, name: str) -> None:
    """Raise BaseModelError unless a layer's weight can be exchanged: it is in memory, and no adapter is merged into it."""
    _refuse_meta(module.weight, name)
    if getattr(module, "merged_adapters", None):
        raise BaseModelError(
            f"layer '{name}': an adapter is fused into it, which a concept's weight would replace; unfuse_lora(), and "
            "leave the adapter loaded beside the concept"
        )


def _refuse_meta(weight: Tensor, name: str) -> None:
    if weight.is_meta:
        raise BaseModelError(
            f"layer '{name}': its weight is offloaded, where no concept can read or change it; use "
            "enable_model_cpu_offload(), or save_pretrained(folder) before offloading and load that"
        )


def refuse_streamed(part: Any, name: str) -> None:
    """Raise BaseModelError where group offloading brings back weights of its own, whatever concepts make of them."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    if isinstance(part, nn.Module) and _is_group_offload_enabled(part):
        raise BaseModelError(f"{name}: group offloading puts back the base's weights; use enable_model_cpu_offload()")
