"""Warn about a configuration, and refuse an engine or an output, in a loop of the user's own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from regate_ds.adapters.huggingface.gates import ElidedOutput
from regate_ds.adapters.huggingface.tower_calls import TowerCalls
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.config import RegateConfig
from regate_ds.data.keyed import NumberImages
from regate_ds.session import Regate

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What ``attach`` was asked for, and what it found."""

    own_loss: bool = False
    """``token_losses`` may be called."""

    tower_unwatched: bool = False
    """The model has a tower, and runs no empty image where a micro-batch has none."""

    runs_by_image: bool = False
    """Some modules of the model run once for each image."""

    tower_calls: TowerCalls = TowerCalls()
    """What ranks agree on of their towers' calls."""

    number_images: NumberImages | None = None
    """Numbers the images of a micro-batch that does not do so itself."""

    def calls_under(self, engine: Any) -> TowerCalls:
        """Return what the ranks of an engine agree on: nothing where they need not."""
        return self.tower_calls.under(engine.zero_optimization_stage(), engine.dp_world_size)


def warn_if_never_sparse(config: RegateConfig, total_steps: int | None) -> None:
    """Log a warning if the run should elide tokens, but its schedule makes every step dense."""
    if not config.chooses or total_steps is None:
        return
    for name, given in config.never_sparse(total_steps).items():
        _log.warning(
            "by %s all of the %d steps are dense, so no token is elided; lower its warmup=%s, "
            "cycle_dense_steps=%d or final_dense_share=%s",
            name,
            total_steps,
            given.warmup,
            given.cycle_dense_steps,
            given.final_dense_share,
        )


def require_engine(engine: Any, options: LoopOptions) -> None:
    """Refuse an engine whose ranks would compute something else, or stop each other."""
    if engine.sequence_parallel_size > 1:
        raise ValueError(
            f"sequence parallel size {engine.sequence_parallel_size} is not supported under "
            "DeepSpeed; set it to 1"
        )
    if engine.dp_world_size > 1 and options.tower_unwatched:
        raise RuntimeError(
            f"the engine has {engine.dp_world_size} data ranks, but attach found one rank: "
            "a rank without an image would stop the others; call "
            "deepspeed.init_distributed() before attach"
        )
    if engine.dp_world_size > 1 and options.runs_by_image and engine.zero_optimization_stage() == 3:
        raise ValueError(
            f"{type(engine.module).__name__} runs some of its modules once for each image: under "
            "ZeRO-3 ranks with different numbers of images would wait for each other; use stage 2"
        )


def record_output(output: Any, session: Regate) -> ElisionPlan:
    """Hand the losses of an output, and its entropies if it has them, to the session; return its
    plan. ValueError for the output of a model that was called without one."""
    if not isinstance(output, ElidedOutput) or output.plan is None:
        raise ValueError(
            f"the model returned {type(output).__name__}, without a plan; call it with all that "
            "is in the batch: engine(**batch)"
        )
    assert output.losses is not None
    entropy = {} if output.entropy is None else {"entropy": output.entropy}
    session.record(output.plan, output.losses, **entropy)
    return output.plan
