"""Which host a training loop has, by what the user hands over."""

from __future__ import annotations

from typing import Any

from torch import nn

from regate_ds.adapters.torch.accelerator import AcceleratorHost, is_accelerator
from regate_ds.adapters.torch.engine import EngineHost, is_engine
from regate_ds.adapters.torch.host import LoopHost
from regate_ds.adapters.torch.plain import Loop, PlainHost


def host_of(given: Any, known: LoopHost | None, model: nn.Module) -> LoopHost:
    """Return the host of a loop around the model.

    given: what the user hands over; None stands for the ``known`` host, of an earlier call.

    ValueError for what is no host, RuntimeError if it is not the known one.
    """
    if known is None:
        return _new_host(given, model)
    if given is not None and given != known.given:
        raise RuntimeError(
            f"{_worded(given)} was given after {_worded(known.given)}, but this attachment serves "
            f"another {known.name} already; attach once per run"
        )
    return known


def _new_host(given: Any, model: nn.Module) -> LoopHost:
    if isinstance(given, Loop):
        return PlainHost(given, model)
    if is_accelerator(given):
        return AcceleratorHost(given, model)
    if is_engine(given):
        return EngineHost(given)
    raise ValueError(
        f"no engine is known ({_worded(given)} was given); hand over a DeepSpeed engine, an "
        "Accelerator, or regate_ds.Loop(accumulation=, group=) at the first call: "
        "regate.windows(loader, engine)"
    )


def _worded(given: Any) -> str:
    return repr(given) if given is None or isinstance(given, Loop) else type(given).__name__
