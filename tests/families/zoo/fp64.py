"""Run a model in fp64 throughout, so that any difference is algebra and not rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOW = {torch.float32, torch.bfloat16, torch.float16}
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


class _Fp64(TorchFunctionMode):
    """Turn each cast to a lower precision, and each such dtype asked for, into fp64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _CASTS:
            func = Tensor.double
        args = tuple(_raised(one) for one in args)
        return func(*args, **{name: _raised(one) for name, one in (kwargs or {}).items()})


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOW else value


@contextmanager
def in_fp64() -> Iterator[None]:
    """Run the block with fp64 in place of every lower precision, and as the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Fp64():
            yield
    finally:
        torch.set_default_dtype(before)
