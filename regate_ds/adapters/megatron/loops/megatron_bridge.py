"""ReGATE in Megatron-Bridge's loop. It was never run with Bridge, only checked against its source.

    with installed_in_bridge(settings) as callback:
        pretrain(config, forward_step, callbacks=[callback])

The loop finds its schedule by name in ``megatron.bridge.training.train``, before any callback, and
the provider of its data sets in ``megatron.bridge.training.pretrain``. These two names are replaced
while the block runs, and each item of the training set gets its number. A callback ends each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from regate_ds.adapters.megatron.loops.deferred import DeferredAttach, HostFacts, LoopSettings
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.data.keyed import Keyed


@contextmanager
def installed_in_bridge(
    settings: LoopSettings,
    tokens: Callable[[Any], TokenBatch] | None = None,
    resume: Path | None = None,
) -> Iterator[Any]:
    """Yield a callback to pass to ``pretrain`` or ``finetune``, which must run inside the block.

    tokens: as in ``attach``; without it ``read_tokens`` reads batches with Megatron's names.
    resume: the checkpoint folder (``iter_...``) that Bridge is going to load, if any.

    ValueError at the start of training if checkpoints are saved asynchronously.
    """
    from megatron.bridge.training import pretrain, train
    from megatron.bridge.training.callbacks import Callback

    length: list[int] = []
    host_facts = HostFacts(total_steps=lambda: length[-1], resume=lambda: resume)
    deferred = DeferredAttach(settings, host_facts, tokens=tokens)
    host, host_data = train.get_forward_backward_func, pretrain.get_dataset_provider

    @wraps(host)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return deferred.wrap(host(*args, **kwargs))

    class RegateCallback(Callback):
        def on_train_start(self, context: Any) -> None:
            if context.state.cfg.checkpoint.async_save:
                raise ValueError(
                    "checkpoint.async_save=True reports a save only after later steps have begun; "
                    "set it False"
                )
            length.append(int(context.state.cfg.train.train_iters))

        def on_train_step_end(self, context: Any) -> None:
            deferred.end_step(applied=not context.skipped_iter)

        def on_checkpoint_save(self, context: Any) -> None:
            step = context.state.train_state.step
            deferred.save(Path(context.state.cfg.checkpoint.save) / f"iter_{step:07d}")

    train.get_forward_backward_func = get_forward_backward_func
    pretrain.get_dataset_provider = lambda config: _keyed(host_data(config), settings.dataset)
    try:
        yield RegateCallback()
    finally:
        train.get_forward_backward_func = host
        pretrain.get_dataset_provider = host_data


def _keyed(provider: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap the host's provider of data sets, so that items of the training set have their key.

    The wrapper keeps the signature, because the host inspects it.
    """

    @wraps(provider)
    def keyed(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        train, valid, test = provider(*args, **kwargs)
        return None if train is None else Keyed(train, name), valid, test

    return keyed
