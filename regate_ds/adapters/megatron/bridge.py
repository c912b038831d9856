"""ReGATE in Megatron-Bridge's loop, by its callbacks. Not run: checked against its source.

    with installed(settings) as callback:
        pretrain(config, forward_step, callbacks=[callback])

The loop looks its schedule up by name in ``megatron.bridge.training.train``, before any callback:
that name is rebound while the block runs. The end of a step is a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from regate_ds.adapters.megatron.hosted import Hosted, HostSettings
from regate_ds.algorithm.batch import TokenBatch


@contextmanager
def installed(
    settings: HostSettings,
    tokens: Callable[[Any], TokenBatch] | None = None,
    resume: Path | None = None,
) -> Iterator[Any]:
    """A callback for ``pretrain`` or ``finetune``, inside whose block they run.

    tokens: as in ``attach``; Bridge's batches have no number of the sample unless yours have.
    resume: the checkpoint folder (``iter_...``) that Bridge is going to load, if it is.
    """
    from megatron.bridge.training import train
    from megatron.bridge.training.callbacks import Callback

    hosted = Hosted(settings, tokens=tokens, resume=lambda: resume)
    host = train.get_forward_backward_func

    @wraps(host)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return hosted.wrap(host(*args, **kwargs))

    class RegateCallback(Callback):
        def on_train_start(self, context: Any) -> None:
            if context.state.cfg.checkpoint.async_save:
                raise ValueError(
                    "checkpoint.async_save=True tells of a save when later steps have begun; set "
                    "it False"
                )

        def on_train_step_end(self, context: Any) -> None:
            hosted.end_step(applied=not context.skipped_iter)

        def on_checkpoint_save(self, context: Any) -> None:
            step = context.state.train_state.step
            hosted.save(Path(context.state.cfg.checkpoint.save) / f"iter_{step:07d}")

    train.get_forward_backward_func = get_forward_backward_func
    try:
        yield RegateCallback()
    finally:
        train.get_forward_backward_func = host
