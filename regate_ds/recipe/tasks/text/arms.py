"""What is compared on plain text: each arm is a configuration, and how much text its steps read."""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.none import NoElision
from regate_ds.config import RegateConfig
from regate_ds.merge_config import MergeConfig
from regate_ds.schedule_config import ScheduleConfig

PATCH, PATCH_SHARE = 4, 2 / 3
"""Size and share of the run of patch-level training (arXiv 2407.12665)."""

SUPERPOSED, SUPERPOSED_SHARE = 4, 0.3
"""The same of token superposition (arXiv 2605.06546); its merged rows are as many times longer."""


@dataclass(frozen=True, kw_only=True)
class TextArm:
    """One way to train the student."""

    about: str
    """One line for the table."""

    config: RegateConfig
    length: float = 1.0
    """Steps, as a share of the dense run's."""

    stretch: int = 1
    """How many rows of text are one row of a merged step."""


_DENSE = RegateConfig(execution=NoElision())

TEXT_ARMS: dict[str, TextArm] = {
    "dense": TextArm(about="every token, every step", config=_DENSE),
    "dense, short": TextArm(
        about="half of the steps: what half of the cost buys anyway", config=_DENSE, length=0.5
    ),
    "merged": TextArm(
        about="patches of 4 in the first two thirds, then tokens",
        config=RegateConfig(
            execution=NoElision(), merge=MergeConfig(size=PATCH, steps=PATCH_SHARE)
        ),
    ),
    "merged, pairs": TextArm(
        about="patches of 2 in the first two thirds, then tokens",
        config=RegateConfig(execution=NoElision(), merge=MergeConfig(size=2, steps=PATCH_SHARE)),
    ),
    "superposed": TextArm(
        about="4 tokens in one for 0.3 of the steps, on rows 4 times as long",
        config=RegateConfig(
            execution=NoElision(), merge=MergeConfig(size=SUPERPOSED, steps=SUPERPOSED_SHARE)
        ),
        stretch=SUPERPOSED,
    ),
    "merged, elided": TextArm(
        about="as merged; half of the tokens then skip all layers but the first",
        config=RegateConfig(
            execution=Elide(),
            merge=MergeConfig(size=PATCH, steps=PATCH_SHARE),
            schedule=ScheduleConfig(warmup=0.1, final_dense_share=0.25),
        ),
    ),
}
"""By name. An arm whose configuration reads a reference has the end of `dense` as its teacher."""
