"""Warn about a configuration, and refuse a model output, in a training loop of the user's own."""

from __future__ import annotations

import logging
from typing import Any

from regate_ds.adapters.huggingface.gates import ElidedOutput
from regate_ds.config import RegateConfig, schedule_of

_log = logging.getLogger(__name__)


def warn_if_never_sparse(config: RegateConfig) -> None:
    """Log a warning if the run should elide tokens, but its schedule makes every step dense."""
    schedule = schedule_of(config)
    sparse = any(not schedule.is_dense(step) for step in range(config.total_steps))
    if config.enabled and config.keep_share < 1.0 and not sparse:
        _log.warning(
            "all of the %d steps are dense, so no token is elided; lower warmup=%s, "
            "cycle_dense_steps=%d or final_dense_share=%s",
            config.total_steps,
            config.warmup,
            config.cycle_dense_steps,
            config.final_dense_share,
        )


def require_elided(output: Any) -> None:
    """Refuse the output of a model that was called without a plan: ValueError."""
    if not isinstance(output, ElidedOutput):
        raise ValueError(
            f"the model returned {type(output).__name__}, without a plan; call it as "
            "engine(**batch, regate_plan=plan)"
        )
