"""A second device that is not there, for machines without one: it refuses what CUDA and Apple's GPUs refuse.

Tensors are plain ones of the CPU whose *storage* has a label, such as "cpu" or "cuda:0". Numbers are real, so that all
that depends on them works; but

- `tensor.device`, `.to()`, `.cpu()` and `device=` go by the labels,
- an operation on tensors of different labels raises as CUDA would, in the backward pass too: single numbers and indices
  may come from the CPU, and `copy_` may cross,
- `.numpy()` of a labelled tensor raises, and so does a generator of the CPU whose result is labelled,
- on a device of kind "mps" all double precision raises,
- all that would make the CPU wait for the device is counted, by file and line.

It is labels of storages and no subclass of tensors, so that `parameter.data = other`, peft, accelerate and diffusers
work unchanged. One mode sees what Python asks for (`device`, `.to`), the other what is computed. It says nothing of a
device's own kernels: which dtypes they know, how fast they are, how they round.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

CPU: Final = "cpu"
NO_SCALARS: Final = {
    *("cat", "stack", "mm", "addmm", "bmm", "baddbmm", "linear", "embedding", "index_select", "gather"),
    *("native_layer_norm", "native_group_norm", "convolution"),
}
"""Operations that take no single numbers of the CPU either."""
CROSSING: Final = {"copy_", "_to_copy", "_copy_from", "set_", "resize_", "_local_scalar_dense", "lift_fresh", "equal"}
INDEXING: Final = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
WAITING: Final = {
    *("_local_scalar_dense", "nonzero", "unique_dim", "_unique", "_unique2", "unique_consecutive", "masked_select"),
    *("equal", "is_nonzero"),
}
RANDOM: Final = (
    *("randn", "rand", "randint", "randperm", "normal", "bernoulli", "multinomial", "uniform", "exponential"),
    *("log_normal", "cauchy", "geometric"),
)
LIKE: Final = {
    *("new_tensor", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
}
"""Functions that make a tensor where another is, or where `device` says."""


class MixedDevicesError(RuntimeError):
    """What CUDA says when tensors of two devices meet."""


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and tables."""
    for one in values:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from tensors_in(one)
        elif isinstance(one, dict):
            yield from tensors_in(one.values())


class SimulatedDevice:
    """A machine with `count` devices of a kind, while inside; `waits` counts how often the CPU waits, by place."""

    def __init__(self, kind: str = "cuda", count: int = 2) -> None:
        self.kind, self.count = kind, count
        self.waits: Counter[str] = Counter()
        self._labels: dict[int, tuple[StorageWeakRef, str]] = {}
        self._room = 20_000
        self._around = [CPU]
        self._modes = (_Computed(self), _Asked(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def named(self, device: Any) -> str:
        """The label of a device: "cpu", "cuda:0" … Raises RuntimeError for one that this machine has not."""
        device = torch.device(device)
        if device.type != self.kind:
            return str(device)
        if (index := device.index or 0) >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        return f"{self.kind}:{index}"

    def is_ours(self, label: str) -> bool:
        """Whether a label is one of these devices'."""
        return label.startswith(self.kind)

    def known_label(self, tensor: Tensor) -> str | None:
        """Where a tensor is; None if nobody said."""
        with torch._C.DisableTorchFunction():
            if tensor.device.type != CPU:
                return str(tensor.device)
            found = self._labels.get(tensor.untyped_storage()._cdata)
        return found and found[1]

    def label(self, tensor: Tensor) -> str:
        """Where a tensor is; on the CPU if nobody said otherwise."""
        return self.known_label(tensor) or CPU

    def put(self, tensor: Tensor, label: str) -> Tensor:
        """The tensor itself, its storage labelled. Raises TypeError for double precision on Apple's."""
        if self.kind == "mps" and self.is_ours(label) and tensor.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        with torch._C.DisableTorchFunction():
            if tensor.device.type == CPU:
                storage = tensor.untyped_storage()
                self._labels[storage._cdata] = (StorageWeakRef(storage), label)  # so that its address stays taken
        if len(self._labels) > self._room:
            self._labels = {key: one for key, one in self._labels.items() if not one[0].expired()}
            self._room = 2 * len(self._labels) + 20_000
        return tensor

    def moved(self, tensor: Tensor, label: str, dtype: torch.dtype | None = None, *, copy: bool = False) -> Tensor:
        """`tensor.to(label, dtype)`, through which gradients flow."""
        source = self.label(tensor)
        with torch._C.DisableTorchFunction():
            tensor = tensor.to(dtype=dtype or tensor.dtype, copy=copy and source == label)
        if source == label:
            return tensor
        if tensor.device.type == "meta":
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        if label == CPU:
            self.wait("copy back")
        return _Transfer.apply(tensor, self, source, label)

    def wait(self, why: str) -> None:
        """Count that the CPU waits here."""
        self.waits[f"{_place()} {why}"] += 1

    @contextlib.contextmanager
    def around(self, label: str) -> Iterator[None]:
        """Inside, tensors that are made of nothing are there."""
        self._around.append(label)
        try:
            yield
        finally:
            self._around.pop()

    @property
    def usual(self) -> str:
        """Where tensors that are made of nothing are."""
        return self._around[-1]


def _place() -> str:
    """File and line of the nearest caller in the package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/mixofshow/" in name:
            return f"{name.split('/mixofshow/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class _Transfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, machine: SimulatedDevice, source: str, target: str) -> Tensor:
        ctx.machine, ctx.source = machine, source
        with torch._C.DisableTorchFunction():
            return machine.put(tensor.detach().clone(memory_format=torch.preserve_format), target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        with torch._C.DisableTorchFunction():
            return ctx.machine.put(grad.clone(), ctx.source), None, None, None


class _Asked(TorchFunctionMode):
    """What Python asks of tensors: where they are, to be moved, to be made."""

    def __init__(self, machine: SimulatedDevice) -> None:
        super().__init__()
        self.machine = machine
        self.properties = {
            Tensor.device.__get__: torch.device,
            Tensor.is_cuda.__get__: lambda label: label.startswith("cuda"),
            Tensor.is_cpu.__get__: lambda label: label == CPU,
            Tensor.is_mps.__get__: lambda label: label.startswith("mps"),
            Tensor.get_device: lambda label: -1 if label == CPU else torch.device(label).index,
        }
        self.methods = {
            Tensor.to: self._to,
            Tensor.cpu: lambda tensor, **_: machine.moved(tensor, CPU),
            Tensor.cuda: lambda tensor, device="cuda", **_: machine.moved(tensor, machine.named(device)),
            Tensor.numpy: self._numpy,
            Tensor.__array__: lambda tensor, *args, **kwargs: self._numpy(tensor).__array__(*args, **kwargs),
            Tensor.tolist: lambda tensor: machine.moved(tensor, CPU).tolist(),
            Tensor.pin_memory: lambda tensor, *_: tensor,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        machine, kwargs = self.machine, dict(kwargs or {})
        if func in self.properties:
            return self.properties[func](machine.label(args[0]))
        if func in self.methods:
            return self.methods[func](*args, **kwargs)
        if func is Tensor.__deepcopy__ and not isinstance(args[0], torch.nn.Parameter):
            return machine.put(func(*args, **kwargs), machine.label(args[0]))
        if func is Tensor.new_tensor and kwargs.get("device") is None:
            return machine.put(func(*args, **kwargs), machine.label(args[0]))
        if func in (torch.as_tensor, torch.asarray):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else machine.moved(made, machine.named(device))
        device, name = kwargs.get("device"), getattr(func, "__name__", "")
        makes = func in _device_constructors()
        if device is not None and (makes or name in LIKE or name in RANDOM):
            return self._made(func, args, kwargs, machine.named(device))
        labels = [CPU] if makes else [*map(machine.label, tensors_in((args, kwargs)))]
        there = next(filter(machine.is_ours, labels), CPU if makes else machine.usual)
        with machine.around(there):
            return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: Any, label: str) -> Any:
        """A new tensor on a device."""
        machine, generator = self.machine, kwargs.get("generator")
        if not machine.is_ours(label):
            with machine.around(label):
                return func(*args, **kwargs)
        if generator is not None and generator.device.type != machine.kind:
            raise RuntimeError(f"Expected a '{machine.kind}' device type for generator but found 'cpu'")
        with machine.around(label):
            return machine.put(func(*args, **{**kwargs, "device": CPU}), label)

    def _numpy(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (label := self.machine.label(tensor)) != CPU:
            raise TypeError(f"can't convert {label} device type tensor to numpy. Use Tensor.cpu() first")
        return tensor.numpy(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        machine = self.machine
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for one in (*args, kwargs.get("other")):
            if isinstance(one, Tensor):
                device, dtype = machine.label(one), one.dtype
            elif isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, int) and not isinstance(one, bool):
                device = torch.device(machine.kind, one)
            elif isinstance(one, str | torch.device):
                device = one
        if device is not None and torch.device(device).type == "meta":
            with torch._C.DisableTorchFunction():
                return tensor.to("meta", dtype=dtype or tensor.dtype)
        label = machine.label(tensor) if device is None else machine.named(device)
        made = machine.moved(tensor, label, dtype, copy=kwargs.get("copy", False))
        if (order := kwargs.get("memory_format")) in (None, torch.preserve_format):
            return made
        with torch._C.DisableTorchFunction():
            return machine.put(made.contiguous(memory_format=order), label)


class _Computed(TorchDispatchMode):
    """What is computed, there and back."""

    def __init__(self, machine: SimulatedDevice) -> None:
        super().__init__()
        self.machine = machine
        self.names: dict[Any, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        machine, kwargs = self.machine, kwargs or {}
        name = self.names.setdefault(func, func._schema.name.split("::")[-1])
        tensors = list(tensors_in((args, kwargs)))
        if any(one.device.type == "meta" for one in tensors):
            return func(*args, **kwargs)
        labels = [machine.label(one) for one in tensors]
        label = self._label_of_result(name, args, tensors, labels)
        if name in WAITING and set(labels) - {CPU}:
            machine.wait(name)
        if (
            name.startswith(RANDOM)
            and label != CPU
            and any(isinstance(one, torch.Generator) for one in kwargs.values())
        ):
            raise RuntimeError(f"Expected a '{machine.kind}' device type for generator but found 'cpu' ({name})")
        made = func(*args, **kwargs)
        for one in tensors_in((made,)):
            if machine.known_label(one) is None:
                machine.put(one, label)
        return made

    def _label_of_result(self, name: str, args: Any, tensors: list[Tensor], labels: list[str]) -> str:
        """Where the result is. Raises MixedDevicesError."""
        if not tensors:
            return self.machine.usual
        if name in CROSSING or len(set(labels)) == 1:
            return labels[0]
        if name.startswith(("_foreach", "_fused", "_amp_foreach")):
            return self._label_of_rows(name, args, labels)
        if name in INDEXING and labels[0] != CPU:
            values = {label for label, one in zip(labels, tensors, strict=True) if one.is_floating_point() and one.ndim}
            if values == {labels[0]}:
                return labels[0]
        large = {label for label, one in zip(labels, tensors, strict=True) if one.ndim}
        single = {label for label, one in zip(labels, tensors, strict=True) if not one.ndim}
        if name not in NO_SCALARS and name not in INDEXING:
            if len(large) == 1 and single - large <= {CPU}:
                return large.pop()
            if not large:
                return next(label for label in labels if label != CPU)
        raise self._mixed(name, tensors, labels)

    def _label_of_rows(self, name: str, args: Any, labels: list[str]) -> str:
        """Where the results of an operation on lists are: each result is made of one tensor of every list."""
        lists = [one for one in args if isinstance(one, list | tuple) and one and isinstance(one[0], Tensor)]
        for row in zip(*[one for one in lists if len(one) == len(lists[0])], strict=True):
            tensors = [one for one in row if one.ndim]
            found = [self.machine.label(one) for one in tensors]
            if len(set(found)) > 1 and "copy" not in name:
                raise self._mixed(name, tensors, found)
        return next(label for label in labels if label != CPU)

    def _mixed(self, name: str, tensors: list[Tensor], labels: list[str]) -> MixedDevicesError:
        shapes = ", ".join(f"{tuple(one.shape)} on {label}" for one, label in zip(tensors, labels, strict=True))
        return MixedDevicesError(
            f"Expected all tensors to be on the same device, but found {shapes} in {name} at {_place()}"
        )
