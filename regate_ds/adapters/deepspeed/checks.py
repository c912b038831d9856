"""What a loop of a user's own is warned of, or refused."""

from __future__ import annotations

import logging
from typing import Any

from regate_ds.adapters.huggingface.gates import ElidedOutput
from regate_ds.config import RegateConfig, schedule_of

_log = logging.getLogger(__name__)


def warn_if_never_sparse(config: RegateConfig) -> None:
    schedule = schedule_of(config)
    sparse = any(not schedule.is_dense(step) for step in range(config.total_steps))
    if config.enabled and config.keep_share < 1.0 and not sparse:
        _log.warning(
            "all of the %d steps are dense: warmup, cycles and final_dense_share leave none "
            "between them",
            config.total_steps,
        )


def require_elided(output: Any) -> None:
    if not isinstance(output, ElidedOutput):
        raise ValueError(
            f"the model returned {type(output).__name__}, without a plan; call it as "
            "engine(**batch, regate_plan=plan)"
        )
