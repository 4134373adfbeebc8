"""What a program's tensors take, and running it for that alone, without computing or filling them.

`Ledger` counts the bytes of all storages that live, by where they are. `Hollow` lets every operation on large tensors
give one of the right shape, place and type that nobody has written to: the system lends memory only where it is touched.
What is small, such as token ids, is computed. So the real program takes the course that it takes with real numbers, as
long as that does not depend on large ones, which are said to be finite, equal and 1.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, Final, Self
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.devices.simulated import SimulatedDevice, tensors_in

SMALL: Final = 2**16
"""Bytes of a storage that is filled."""
RANDOM: Final = ("randn", "rand", "randint", "randperm", "normal", "uniform", "bernoulli")
CHECKPOINT: Final = torch.utils.checkpoint.checkpoint
IN_SINGLE: Final = {
    torch.nn.functional.layer_norm,
    torch.nn.functional.group_norm,
    torch.nn.functional.softmax,
    torch.softmax,
    Tensor.softmax,
}
"""What CUDA's autocast computes in single precision, and the CPU's does not."""


class Ledger:
    """Bytes of living storages by place, and the most that there were at a time."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def note(self, tensor: Tensor, place: str) -> None:
        """A tensor's storage is there, new or moved."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if found := self._known.get(key):
            self.now[found[1]] -= found[2]
        self._known[key] = (weakref.ref(storage, lambda gone, key=key: self._gone(key, gone)), place, size)
        self.now[place] += size
        self.peak[place] = max(self.peak[place], self.now[place])

    def _gone(self, key: int, reference: Any) -> None:
        if (found := self._known.get(key)) and found[0] is reference:
            del self._known[key]
            self.now[found[1]] -= found[2]

    def knows(self, tensor: Tensor) -> bool:
        """Whether the storage was noted."""
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._known


class Metered(TorchDispatchMode):
    """Notes all that is made while inside, and what is there already and used, in one place."""

    def __init__(self, ledger: Ledger, place: str = "cpu") -> None:
        super().__init__()
        self.ledger, self.place = ledger, place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tensors_in((args, made)):
            if one.device.type == "cpu" and not self.ledger.knows(one):
                self.ledger.note(one, self.place)
        return made


class MeteredDevice(SimulatedDevice):
    """A simulated device whose tensors are noted."""

    def __init__(self, ledger: Ledger, kind: str = "cuda") -> None:
        super().__init__(kind, 1)
        self.ledger = ledger

    def put(self, tensor: Tensor, label: str) -> Tensor:
        self.ledger.note(tensor, label)
        return super().put(tensor, label)


class LikeCuda(TorchFunctionMode):
    """Norms and softmax in single precision within autocast, as on a GPU; also where the backward pass computes again."""

    def __enter__(self) -> Self:
        self._patches = [
            mock.patch(f"{module}.checkpoint", self._checkpoint)
            for module in ("torch.utils.checkpoint", "transformers.modeling_utils")
        ]
        for one in self._patches:
            one.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for one in self._patches:
            one.stop()

    @staticmethod
    def _checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        """Torch leaves modes of this kind while it goes backward."""

        def there_and_back(*given: Any, **named: Any) -> Any:
            with _InSingle():
                return function(*given, **named)

        return CHECKPOINT(there_and_back, *args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _in_single(func, args, kwargs or {})


class _InSingle(TorchFunctionMode):

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _in_single(func, args, kwargs or {})


def _in_single(func: Any, args: Any, kwargs: Any) -> Any:
    if func in IN_SINGLE and torch.is_autocast_enabled("cpu"):
        args, kwargs = tree_map_only(Tensor, lambda one: one.float() if one.is_floating_point() else one, (args, kwargs))
    return func(*args, **kwargs)


class Hollow(TorchDispatchMode):
    """Operations on large tensors give what nobody has written to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._made(func, args, kwargs or {})
        if "empty" in func.name() and isinstance(made, Tensor) and made.device.type == "cpu":
            _filled(made)  # what is written into it may be hollow
        return made

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = list(tensors_in((args, kwargs)))
        if any(one.device.type == "meta" for one in given) or _is_view(func):
            return func(*args, **kwargs)
        if given and all(one.untyped_storage().nbytes() <= SMALL for one in given):
            made = None if "generator" in kwargs else self._shapes(func, args, kwargs, given)
            if all(one.nbytes <= SMALL for one in tensors_in((made,))):
                return func(*args, **kwargs)
        if names := [one.name for one in func._schema.arguments if one.alias_info and one.alias_info.is_write]:
            return _written(func, names, args, kwargs)
        made = self._shapes(func, args, kwargs, given)
        if not given and all(one.nbytes <= SMALL for one in tensors_in((made,))):
            return func(*args, **kwargs)
        if made is NotImplemented:  # of a shape that depends on numbers, as of those that a mask selects
            return tree_map_only(Tensor, _filled, func(*args, **kwargs))
        return tree_map_only(Tensor, _unwritten, made)

    @staticmethod
    def _shapes(func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """The results on torch's device that has shapes only; NotImplemented where it does not know them."""
        args, kwargs = tree_map_only(Tensor, _shape, (args, kwargs))
        if "device" in kwargs or not given:
            kwargs = {**kwargs, "device": "meta"}
        if kwargs.pop("generator", None) is not None or func.name().split("::")[-1].startswith(RANDOM):
            if given:  # as many numbers as they have
                return _shape(given[0])
            sizes = next((one for one in args if isinstance(one, list | tuple)), args[:1])
            return torch.empty(sizes, dtype=kwargs.get("dtype") or torch.get_default_dtype(), device="meta")
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            return NotImplemented


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _unwritten(shape: Tensor) -> Tensor:
    return _filled(torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype))


def _filled(made: Tensor) -> Tensor:
    if made.untyped_storage().nbytes() <= SMALL:
        made.fill_(1 if made.dtype.is_floating_point or made.dtype == torch.bool else 0)
    return made


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def _written(func: Any, names: list[str], args: Any, kwargs: Any) -> Any:
    """What an operation in place gives back, though nothing was written."""
    by_name = {one.name: value for one, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    values = [by_name.get(name) for name in names]
    count = len(func._schema.returns)
    return None if not count else values[0] if count == 1 else tuple(values)
