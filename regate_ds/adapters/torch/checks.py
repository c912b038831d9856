"""Warn about a configuration, and refuse a host or an output, in a loop of the user's own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from regate_ds.adapters.huggingface.gates import ElidedOutput
from regate_ds.adapters.huggingface.support import require_unwrapped
from regate_ds.adapters.huggingface.tower_calls import TowerCalls
from regate_ds.adapters.torch.host import LoopHost
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.config import RegateConfig
from regate_ds.data.keyed import NumberImages
from regate_ds.session import Regate

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What ``attach`` was asked for, and what it found."""

    model: nn.Module
    """The model that was attached, which the host may have sharded since."""

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

    def calls_under(self, host: LoopHost) -> TowerCalls:
        """Return what the ranks of a host agree on: nothing where they need not."""
        if host.num_ranks == 1:
            return TowerCalls()
        return self.tower_calls.under(host.stage, host.num_ranks)


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


def warn_if_not_loaded(host: LoopHost, session: Regate) -> None:
    """Log a warning if the host goes on with a run of which the session knows nothing."""
    if host.steps_taken and not session.step:
        _log.warning(
            "the %s has taken %d optimizer steps before, but no state of the method was loaded: "
            "its schedule and difficulty begin anew; call regate.load(folder) before the first "
            "window",
            host.name,
            host.steps_taken,
        )


def require_loop_ranks(host: LoopHost, options: LoopOptions) -> None:
    """Refuse ranks that would compute something else, or stop each other."""
    require_unwrapped(options.model, but=FSDPModule)
    if host.num_ranks > 1 and options.tower_unwatched:
        raise RuntimeError(
            f"the {host.name} has {host.num_ranks} data ranks, but attach found one rank: "
            f"a rank without an image would stop the others; call {host.joined_by} before attach"
        )
    if host.num_ranks > 1 and options.runs_by_image and host.stage == 3:
        raise ValueError(
            f"{type(options.model).__name__} runs some of its modules once for each image: under "
            "ZeRO-3 or FSDP2 ranks with different numbers of images would wait for each other; "
            "use stage 2, or DDP"
        )


def record_output(output: Any, session: Regate) -> ElisionPlan:
    """Hand the losses of an output, and its entropies if it has them, to the session; return its
    plan. ValueError for the output of a model that was called without one."""
    if not isinstance(output, ElidedOutput) or output.plan is None:
        raise ValueError(
            f"the model returned {type(output).__name__}, without a plan; call it with all that "
            "is in the batch: model(**batch)"
        )
    assert output.losses is not None
    entropy = {} if output.entropy is None else {"entropy": output.entropy}
    session.record(output.plan, output.losses, **entropy)
    return output.plan
