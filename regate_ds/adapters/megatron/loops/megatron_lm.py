"""ReGATE in Megatron-LM's own loop: ``pretrain`` of ``megatron.training``, which has no callback.

    with installed(settings):
        pretrain(...)

Four names of ``megatron/training/training.py`` are replaced while the block runs, after a check of
their signatures: the schedule plans each step, the end of a train step ends it, a checkpoint also
holds the method's state, and each item of a map-style data set gets its number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from regate_ds.adapters.megatron.loops.deferred import DeferredAttach, HostFacts, LoopSettings
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.data.keyed import Keyed

TESTED_MEGATRON_LM = ("0.19.2",)
"""Versions whose loop was run. Versions from 0.16.1 on have the same signatures."""

_EXPECTED = {
    "get_forward_backward_func": (),
    "train_step": ("data_iterator", "model", "optimizer", "forward_backward_func"),
    "save_checkpoint": ("iteration", "model"),
    "build_pretraining_data_loader": ("dataset", "consumed_samples"),
}
"""Names that are replaced, and the parameters that each must have."""

_NOT_APPLIED, _EXITS = 1, 3
"""Indices into what a train step returns: the update was not applied; the job ends before it."""


@contextmanager
def installed(
    settings: LoopSettings, tokens: Callable[[Any], TokenBatch] | None = None
) -> Iterator[DeferredAttach]:
    """Make Megatron-LM's loop elide tokens while the block runs.

    tokens: as in ``attach``; without it ``read_tokens`` reads batches with Megatron's names.

    ImportError if ``megatron.training`` is not installed, ValueError if it lacks a name or a
    parameter that is needed.
    """
    from megatron.training import training

    _require_known(training)
    host = HostFacts(total_steps=_train_iters, resume=_loaded_folder)
    deferred = DeferredAttach(settings, host, tokens=tokens)
    hosts = {name: getattr(training, name) for name in _EXPECTED}
    for name, ours in _replacements(deferred, hosts).items():
        setattr(training, name, ours)
    try:
        yield deferred
    finally:
        for name, host in hosts.items():
            setattr(training, name, host)


def _require_known(training: Any) -> None:
    """Refuse a ``megatron.training.training`` without the names and parameters of ``_EXPECTED``."""
    for name, parameters in _EXPECTED.items():
        host = getattr(training, name, None)
        if host is None:
            raise ValueError(
                f"megatron.training.training has no {name}; install megatron-core "
                f"{TESTED_MEGATRON_LM[-1]}, which is tested"
            )
        known = inspect.signature(host).parameters
        missing = [parameter for parameter in parameters if parameter not in known]
        if missing:
            raise ValueError(
                f"megatron.training.training.{name} takes no {', '.join(missing)}; install "
                f"megatron-core {TESTED_MEGATRON_LM[-1]}, which is tested"
            )


def _replacements(deferred: DeferredAttach, hosts: dict[str, Any]) -> dict[str, Any]:
    """Return what replaces each name of ``_EXPECTED``; ``hosts`` are the host's own functions."""

    @wraps(hosts["get_forward_backward_func"])
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return deferred.wrap(hosts["get_forward_backward_func"](*args, **kwargs))

    @wraps(hosts["train_step"])
    def train_step(*args: Any, **kwargs: Any) -> Any:
        result = hosts["train_step"](*args, **kwargs)
        if result[_EXITS]:
            deferred.abandon_step()
        else:
            deferred.end_step(applied=not result[_NOT_APPLIED])
        return result

    @wraps(hosts["save_checkpoint"])
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        result = hosts["save_checkpoint"](iteration, *args, **kwargs)
        if not kwargs.get("non_persistent_ckpt", False):
            deferred.save(_folder("save", iteration))
        return result

    @wraps(hosts["build_pretraining_data_loader"])
    def build_pretraining_data_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        has_numbers = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        dataset = Keyed(dataset, deferred.settings.dataset) if has_numbers else dataset
        return hosts["build_pretraining_data_loader"](dataset, *args, **kwargs)

    return {
        "get_forward_backward_func": get_forward_backward_func,
        "train_step": train_step,
        "save_checkpoint": save_checkpoint,
        "build_pretraining_data_loader": build_pretraining_data_loader,
    }


def _train_iters() -> int:
    from megatron.training import get_args

    return int(get_args().train_iters)


def _loaded_folder() -> Path | None:
    """Return the checkpoint folder that Megatron-LM has loaded; None if it has loaded none."""
    from megatron.training import get_args

    iteration = get_args().iteration
    return _folder("load", iteration) if iteration > 0 else None


def _folder(kind: str, iteration: int) -> Path:
    """Return the folder of an iteration's checkpoint; ``kind`` is "save" or "load"."""
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name

    return Path(get_checkpoint_name(getattr(get_args(), kind), iteration, return_base_dir=True))
