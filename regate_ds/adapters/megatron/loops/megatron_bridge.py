"""ReGATE in Megatron-Bridge's loop, its ``pretrain`` and its ``finetune``.

    with installed_in_bridge(settings) as callback:
        pretrain(config, forward_step, callbacks=[callback])

The loop finds its schedule by name in ``megatron.bridge.training.train``, before any callback, and
the provider of its data sets in ``megatron.bridge.training.pretrain``. These two names are replaced
while the block runs: each item of the training set gets its number, which a data set's own collate
function does not see. A callback ends each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from regate_ds.adapters.megatron.loops.deferred import DeferredAttach, HostFacts, LoopSettings
from regate_ds.adapters.megatron.samples import RepeatedTokens
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.data.keyed import KEY, Keyed


@contextmanager
def installed_in_bridge(
    settings: LoopSettings,
    tokens: Callable[[Any], TokenBatch] | None = None,
) -> Iterator[Any]:
    """Yield a callback to pass to ``pretrain`` or ``finetune``, which must run inside the block.

    tokens: as in ``attach``; without it ``read_tokens`` reads batches with Megatron's names, and
        images at the image and video tokens of the model's configuration.

    A run that goes on at a step of a checkpoint goes on there with schedule and difficulty, too.

    ValueError at the start of training if checkpoints are saved asynchronously; RuntimeError if the
    callback was not passed.
    """
    from megatron.bridge.training import pretrain, train

    states: list[Any] = []

    def state() -> Any:
        if not states:
            raise RuntimeError(
                "training began without the callback of installed_in_bridge, which ends its steps; "
                "pass callbacks=[callback]"
            )
        return states[-1]

    host_facts = HostFacts(
        total_steps=lambda: int(state().cfg.train.train_iters),
        resume=lambda: _loaded_checkpoint(state()),
        image=lambda: _repeated_tokens(state().cfg.model),
    )
    deferred = DeferredAttach(settings, host_facts, tokens=tokens)
    host, host_data = train.get_forward_backward_func, pretrain.get_dataset_provider

    @wraps(host)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return deferred.wrap(host(*args, **kwargs))

    train.get_forward_backward_func = get_forward_backward_func
    pretrain.get_dataset_provider = lambda config: _keyed(host_data(config), settings.dataset)
    try:
        yield _callback(deferred, states)
    finally:
        train.get_forward_backward_func = host
        pretrain.get_dataset_provider = host_data


def _callback(deferred: DeferredAttach, states: list[Any]) -> Any:
    """Return what tells the host's steps and saves; it puts the host's state into ``states``."""
    from megatron.bridge.training.callbacks import Callback

    class RegateCallback(Callback):
        def on_train_start(self, context: Any) -> None:
            if context.state.cfg.checkpoint.async_save:
                raise ValueError(
                    "checkpoint.async_save=True reports a save only after later steps have begun; "
                    "set it False"
                )
            states.append(context.state)

        def on_train_step_end(self, context: Any) -> None:
            deferred.end_step(applied=not context.skipped_iter)

        def on_checkpoint_save(self, context: Any) -> None:
            step = context.state.train_state.step
            deferred.save(Path(context.state.cfg.checkpoint.save) / f"iter_{step:07d}")

    return RegateCallback()


def _loaded_checkpoint(state: Any) -> Path | None:
    """Return the folder of the checkpoint that the run goes on from; None at its first step."""
    step, load = state.train_state.step, state.cfg.checkpoint.load
    if step == 0 or load is None:
        return None
    folder = Path(load)
    return folder if folder.name.startswith("iter_") else folder / f"iter_{step:07d}"


def _repeated_tokens(model: Any) -> RepeatedTokens | None:
    """Return the ids that stand in a row's tokens for each embedding of an image or a video."""
    named = (getattr(model, f"{name}_token_id", None) for name in ("image", "video"))
    ids = tuple(one for one in named if one is not None)
    return RepeatedTokens(ids) if ids else None


def _keyed(provider: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap the host's provider of data sets, so that items of the training set have their key.

    The wrapper keeps the signature, because the host inspects it.
    """

    @wraps(provider)
    def keyed(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        train, valid, test = provider(*args, **kwargs)
        return None if train is None else _keyed_data(train, name), valid, test

    return keyed


def _keyed_data(data: Any, name: str) -> Keyed:
    keyed = Keyed(data, name)
    if hasattr(data, "collate_fn"):
        # The host gives its loader what this name says.
        keyed.collate_fn = _NamedBatches(data.collate_fn)
    return keyed


class _NamedBatches:
    """A data set's own collate function, whose batches also have the keys of their samples.

    They stand there as torch's collate function puts them: names, and a tensor of numbers.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], dict[str, Any]]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        names, numbers = zip(*(item[KEY] for item in items), strict=True)
        batch = self._collate_fn([{k: v for k, v in one.items() if k != KEY} for one in items])
        return {**batch, KEY: [names, torch.tensor(numbers)]}
