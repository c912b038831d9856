"""What is measured of a step besides its time: bytes, transfers, and waits for the device.

Each is a mode of torch that is entered around the step. It sees every operator, and costs time: a
step is timed without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the bytes of live tensors that operators have made.

    ``peak`` is the largest count after any operator. It leaves out memory that a kernel takes and
    frees within itself, and tensors that were there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            # In inference mode an operator that is made of others arrives undivided.
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        output = func(*args, **kwargs)
        for tensor in tensors_in(output):
            storage = tensor.untyped_storage()
            # A view shares the storage of its source, so it adds no bytes.
            if storage._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {at: made for at, made in self._made.items() if not made[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return output


class SavedBytes:
    """Bytes that the layers of a decoder save for the backward pass, weights apart.

    What embeddings and head save does not count, and a storage counts once. Where layers are
    checkpointed, torch saves their inputs in a way that is not seen here.
    """

    def __init__(self, layers: Iterable[nn.Module], weights: Iterable[Tensor] = ()) -> None:
        """weights: what the layers run with in place of their own, if they do."""
        self._layers = list(layers)
        own = [p for layer in self._layers for p in layer.parameters()]
        self._known = {p.untyped_storage()._cdata for p in [*own, *weights]}
        self._saved: dict[int, tuple[Tensor, int]] = {}
        self._inside: list[int] = []

    @property
    def total(self) -> int:
        return sum(self.by_layer)

    @property
    def by_layer(self) -> list[int]:
        """The bytes that each layer was the first to save."""
        sizes = [0] * len(self._layers)
        for tensor, number in self._saved.values():
            sizes[number] += tensor.untyped_storage().nbytes()
        return sizes

    @contextmanager
    def watching(self) -> Iterator[SavedBytes]:
        """Count what is saved in the block."""
        handles = []
        for number, layer in enumerate(self._layers):
            enter = partial(self._enter, number)
            handles.append(layer.register_forward_pre_hook(enter))
            handles.append(layer.register_forward_hook(self._leave, always_call=True))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, number: int, *_: Any) -> None:
        self._inside.append(number)

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._inside and storage._cdata not in self._known:
            # Held, so that its place is not taken by another that would then be missed.
            self._saved.setdefault(storage._cdata, (tensor.detach(), self._inside[-1]))
        return tensor


class Traffic(TorchDispatchMode):
    """Bytes that this rank hands to point-to-point sends, and to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.collective = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = str(func.name()).partition("::")
        if namespace == "c10d" and not name.startswith(("recv", "barrier")):
            size = sum(t.numel() * t.element_size() for t in _given(name, args))
            if name.startswith("send"):
                self.sent += size
            else:
                self.collective += size
        return func(*args, **(kwargs or {}))


def _given(name: str, args: Sequence[Any]) -> list[Tensor]:
    """Return what a collective reads; where it has outputs of its own, they come first."""
    has_outputs = name.startswith(("allgather", "_allgather", "reduce_scatter", "_reduce_scatter"))
    has_outputs = has_outputs or name.startswith(("alltoall", "gather", "scatter"))
    return tensors_in(args[1] if has_outputs else args[0])


WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
    "repeat_interleave.Tensor",
)
"""Operators whose result, or its shape, the host has to wait for; ``index`` by booleans is one."""

_TO_HOST = ("tolist", "cpu", "numpy")


class DeviceWaits:
    """Counts what would make the host wait for the device, if ``on_device`` were there.

    What operators make of such tensors is on the device as well. So the count can be taken where
    there is no device. ``by_name`` says which calls they were.
    """

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        self.by_name: Counter[str] = Counter()
        self._there: dict[int, StorageWeakRef] = {}
        self.put(on_device)

    @property
    def total(self) -> int:
        return self.by_name.total()

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Take these tensors to be on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._there[storage._cdata] = StorageWeakRef(storage)

    def take(self, tensor: Tensor) -> None:
        """Take this tensor to be on the host."""
        self._there.pop(tensor.untyped_storage()._cdata, None)

    def has(self, tensor: Tensor) -> bool:
        found = self._there.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    @contextmanager
    def watching(self) -> Iterator[DeviceWaits]:
        with _Calls(self), _Operators(self):
            yield self


class _Calls(TorchFunctionMode):
    """Calls that copy a tensor to the host, which on a CPU never reach an operator."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_copy = name in _TO_HOST or (name == "to" and _names_cpu([*args[1:], *kwargs.values()]))
        if is_copy and args and isinstance(args[0], Tensor) and self._waits.has(args[0]):
            self._waits.by_name[name] += 1
            copy = args[0].detach().clone()
            self._waits.take(copy)
            return func(copy, *args[1:], **kwargs)
        return func(*args, **kwargs)


def _names_cpu(values: Iterable[Any]) -> bool:
    return any(isinstance(v, str | torch.device) and str(v).startswith("cpu") for v in values)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, waits = kwargs or {}, self._waits
        given = [tensor for tensor in tensors_in((args, kwargs)) if waits.has(tensor)]
        output = func(*args, **kwargs)
        if func.namespace == "c10d":
            # Activations of other ranks arrive on the device; whole numbers may be of the host's.
            arrived = [t for t in tensors_in((args, output)) if t.is_floating_point()]
            waits.put(arrived)
        elif given:
            name = str(func.name()).removeprefix("aten::")
            if name.split(".")[0] in WAITS or name in WAITS or _by_booleans(name, args):
                waits.by_name[name] += 1
            waits.put(tensors_in(output))
        return output


def _by_booleans(name: str, args: Sequence[Any]) -> bool:
    if name.split(".")[0] not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(t.dtype == torch.bool for t in tensors_in(args[1]))


def tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
