"""What a teacher does to its logits after the head's matrix product."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from regate_ds.algorithm.loss import UNCHANGED, LogitChange
from regate_ds.families.hosts import supported
from regate_ds.teacher.host_text import HostText

_FACTORS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_mup_width_multiplier",
    "logits_scaling",
    "logits_soft_cap",
    "output_multiplier",
)
"""Config fields by which classes of transformers 5.24 change the logits."""


def logit_change(teacher: Any) -> LogitChange:
    """Return it, for a whole causal language model.

    ValueError for a class that no test has compared, if its config names such a change.
    """
    if isinstance(teacher, HostText):
        return teacher.change
    if isinstance(teacher, PreTrainedModel):
        try:
            return supported(teacher).change
        except ValueError:
            pass  # A teacher may be of any class that leaves its logits as they are.
    _require_no_factor(teacher)
    return UNCHANGED


def _require_no_factor(teacher: Any) -> None:
    config: Any = getattr(teacher, "config", None)
    if isinstance(config, PreTrainedConfig):
        config = config.get_text_config(decoder=True)
    for name in _FACTORS:
        if (value := getattr(config, name, None)) not in (None, 1, 1.0):
            raise ValueError(
                f"the teacher's {name}={value} changes its logits after the head, which is not "
                f"known of {type(teacher).__name__}; use a teacher without it"
            )
