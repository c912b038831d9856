"""Let megatron-core run on CPUs over gloo.

megatron-core 0.16 and 0.19 use CUDA by name in a few places: as the device of small tensors, for
random states, and to synchronise. ``install`` makes these calls use the CPU.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._device import _device_constructors

from regate_ds.adapters.megatron_on_cpu.modules import WholeLinear

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn")


def install() -> None:
    """Replace the calls. Run it once per process, before a megatron-core module is used."""
    # `with torch.device(...)` remembers the factories at its first use: here, torch's own.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    for name in ("synchronize", "set_device", "manual_seed", "empty_cache"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    torch.cuda._lazy_call = lambda callback, **_: callback()
    torch.cuda.current_stream = lambda *_: _Stream()  # type: ignore[assignment]
    torch.cuda.default_stream = lambda *_: _Stream()  # type: ignore[assignment]
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    dist.all_to_all_single = _with_list_splits(dist.all_to_all_single)
    Tensor.type = _type(Tensor.type)  # type: ignore[method-assign]
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]

    from megatron.core.tensor_parallel import random as parallel_random
    from megatron.core.transformer import multi_latent_attention as latent
    from megatron.core.transformer.moe import moe_utils

    # 0.16.1 looks this name up even if Transformer Engine is missing.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)

    # Latent attention asks whether its layers are Transformer Engine's.
    stand_ins = {"TELinear": WholeLinear, "TEColumnParallelLinear": type("Column", (), {})}
    for name, stand_in in stand_ins.items():
        if not isinstance(getattr(latent, name), type):
            setattr(latent, name, stand_in)

    parallel_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    parallel_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


def _on_cpu(factory: Any) -> Any:
    """Wrap a factory of tensors so that it makes CPU tensors where a CUDA device is named."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made


def _type(host_type: Any) -> Any:
    """Wrap ``Tensor.type`` so that it returns the names of CUDA's types.

    Megatron's optimizers compare a tensor's type with these names.
    """

    def typed(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = host_type(self, *args, **kwargs)
        named = isinstance(found, str) and not found.startswith("torch.cuda.")
        return found.replace("torch.", "torch.cuda.", 1) if named else found

    return typed


def _with_list_splits(exchange: Any) -> Any:
    """Wrap ``all_to_all_single`` so that it accepts split sizes as tensors.

    Megatron's dispatcher passes tensors if they are on the CPU already.
    """

    def exchanged(output: Tensor, given: Tensor, *splits: Any, **kwargs: Any) -> Any:
        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, Tensor) else value

        named = {name: plain(value) for name, value in kwargs.items()}
        return exchange(output, given, *map(plain, splits), **named)

    return exchanged
