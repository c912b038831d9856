"""ReGATE in Megatron-LM's own loop: ``pretrain`` of ``megatron.training``, which has no callback.

    with installed(settings):
        pretrain(...)

Four names of ``megatron/training/training.py`` are rebound while the block runs, after a check of
their signatures: the schedule plans, a train step ends ours, a checkpoint holds our state, and the
items of map-style data sets say their number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from regate_ds.adapters.megatron.loops.deferred import DeferredAttach, LoopSettings
from regate_ds.adapters.megatron.samples import Numbered
from regate_ds.algorithm.batch import TokenBatch

TESTED_MEGATRON_LM = ("0.19.2",)
"""Versions whose loop was run. Those from 0.16.1 have the same signatures."""

_EXPECTED = {
    "get_forward_backward_func": (),
    "train_step": ("data_iterator", "model", "optimizer", "forward_backward_func"),
    "save_checkpoint": ("iteration", "model"),
    "build_pretraining_data_loader": ("dataset", "consumed_samples"),
}
"""Names that are rebound, and the parameters that each must have."""

_SKIPPED, _EXITS = 1, 3
"""Places of what a train step returns: was the update skipped, and does the job end before it."""


@contextmanager
def installed(
    settings: LoopSettings, tokens: Callable[[Any], TokenBatch] | None = None
) -> Iterator[DeferredAttach]:
    """Run Megatron-LM's loop with elision inside the block.

    tokens: as in ``attach``, where the data are not dicts of Megatron's names.

    ImportError if ``megatron.training`` is not there, ValueError if it is of another kind.
    """
    from megatron.training import training

    _require_known(training)
    deferred = DeferredAttach(settings, tokens=tokens, resume=_loaded_folder)
    hosts = {name: getattr(training, name) for name in _EXPECTED}
    for name, ours in _replacements(deferred, hosts).items():
        setattr(training, name, ours)
    try:
        yield deferred
    finally:
        for name, host in hosts.items():
            setattr(training, name, host)


def _require_known(training: Any) -> None:
    for name, parameters in _EXPECTED.items():
        host = getattr(training, name, None)
        if host is None:
            raise ValueError(
                f"megatron.training.training has no {name}; megatron-core "
                f"{TESTED_MEGATRON_LM[-1]} is tested"
            )
        known = inspect.signature(host).parameters
        missing = [parameter for parameter in parameters if parameter not in known]
        if missing:
            raise ValueError(
                f"megatron.training.training.{name} takes no {', '.join(missing)}; megatron-core "
                f"{TESTED_MEGATRON_LM[-1]} is tested"
            )


def _replacements(deferred: DeferredAttach, hosts: dict[str, Any]) -> dict[str, Any]:
    @wraps(hosts["get_forward_backward_func"])
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return deferred.wrap(hosts["get_forward_backward_func"](*args, **kwargs))

    @wraps(hosts["train_step"])
    def train_step(*args: Any, **kwargs: Any) -> Any:
        result = hosts["train_step"](*args, **kwargs)
        if result[_EXITS]:
            deferred.abandon_step()
        else:
            deferred.end_step(applied=not result[_SKIPPED])
        return result

    @wraps(hosts["save_checkpoint"])
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        result = hosts["save_checkpoint"](iteration, *args, **kwargs)
        if not kwargs.get("non_persistent_ckpt", False):
            deferred.save(_folder("save", iteration))
        return result

    @wraps(hosts["build_pretraining_data_loader"])
    def build_pretraining_data_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        can_number = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        dataset = Numbered(dataset) if can_number else dataset
        return hosts["build_pretraining_data_loader"](dataset, *args, **kwargs)

    return {
        "get_forward_backward_func": get_forward_backward_func,
        "train_step": train_step,
        "save_checkpoint": save_checkpoint,
        "build_pretraining_data_loader": build_pretraining_data_loader,
    }


def _loaded_folder() -> Path | None:
    from megatron.training import get_args

    iteration = get_args().iteration
    return _folder("load", iteration) if iteration > 0 else None


def _folder(kind: str, iteration: int) -> Path:
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name

    return Path(get_checkpoint_name(getattr(get_args(), kind), iteration, return_base_dir=True))
