"""The schedules of a run as its checkpoint has them: a resume must have the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from regate_ds.algorithm.schedule import Schedule
from regate_ds.config import RegateConfig


def schedule_state(config: RegateConfig, total_steps: int) -> dict[str, Any]:
    """Return the schedules of a run of so many steps, for its checkpoint."""
    merged, images = _merged_steps(config, total_steps), _image_schedule(config, total_steps)
    return {
        "run_steps": total_steps,
        **asdict(_schedule(config, total_steps)),
        **({"images": images} if images is not None else {}),
        **({"merged_steps": merged} if merged else {}),
    }


def require_same_schedule(config: RegateConfig, total_steps: int, state: Mapping[str, Any]) -> None:
    """Refuse, by ValueError, a checkpoint's state of another length of the run or schedule."""
    if state["run_steps"] != total_steps:
        raise ValueError(
            f"total_steps={total_steps}, but the checkpoint's run has "
            f"{state['run_steps']}: the schedule would change; resume with the same value"
        )
    merged, saved_merged = _merged_steps(config, total_steps), state.get("merged_steps", 0)
    if saved_merged != merged:
        raise ValueError(
            f"merge.steps={config.merge.steps} makes {merged} merged steps, but the checkpoint's "
            f"run has {saved_merged}; resume with the same value"
        )
    _schedule(config, total_steps).require_same(state)
    images, saved = _image_schedule(config, total_steps), state.get("images")
    if saved != images:
        raise ValueError(
            f"images.schedule is {images} by this configuration, but {saved} in "
            "the checkpoint's run; resume with the same schedule"
        )


def _merged_steps(config: RegateConfig, total_steps: int) -> int:
    return config.merge.in_steps(total_steps)


def _schedule(config: RegateConfig, total_steps: int) -> Schedule:
    return config.schedule.in_steps(total_steps - _merged_steps(config, total_steps))


def _image_schedule(config: RegateConfig, total_steps: int) -> dict[str, Any] | None:
    """The schedule of images; None if they have none of their own."""
    own = config.images.schedule
    length = total_steps - _merged_steps(config, total_steps)
    return None if own is None else asdict(own.in_steps(length))
