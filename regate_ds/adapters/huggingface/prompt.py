"""Virtual tokens that peft's prompt learning puts before each row of a micro-batch.

They have weights to train and no label. So they are always kept, and the plan is moved by their
number; to the session it is the plan of the samples still.

Shapes: B rows, V virtual tokens, T positions, K slots, L targets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.adapters.huggingface.empty_image import has_tower
from regate_ds.algorithm.plan import ElisionPlan

_BEFORE_EMBEDDINGS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
"""Methods of peft that put their tokens before the embedded rows, and do no more."""


def num_virtual_tokens(model: nn.Module, host: nn.Module) -> int:
    """Return how many virtual tokens the model puts before each row; 0 without prompt learning.

    ValueError names a method that does more than that, or a model that it is not tested with.
    """
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0
    name = type(config).__name__
    if config.peft_type not in _BEFORE_EMBEDDINGS:
        raise ValueError(
            f"{name} puts its tokens into a cache, or computes a loss of its own with them, which "
            f"a plan cannot do; use LoRA, or one of {', '.join(_BEFORE_EMBEDDINGS)}"
        )
    if config.task_type != "CAUSAL_LM":
        raise ValueError(
            f"{name} has task_type={config.task_type}, which is not that of a language model; set "
            "task_type='CAUSAL_LM'"
        )
    if has_tower(host):
        raise ValueError(
            f"{name} puts tokens before rows with images of a {type(host).__name__}, whose marks "
            "of image tokens peft does not move; use LoRA"
        )
    return config.num_virtual_tokens


def behind_virtual_tokens(plan: ElisionPlan, num_virtual: int) -> ElisionPlan:
    """Return the plan for rows that begin with so many more tokens, which all are kept.

    ValueError if a row holds several samples: all but the first would not see these tokens.
    """
    if plan.is_packed:
        raise ValueError(
            "a row holds several samples behind one prompt of virtual tokens, which only the first "
            "would see; give each sample a row of its own"
        )
    num_rows, num_slots = plan.kept_BK.shape
    device, wide = plan.kept_BK.device, num_slots + num_virtual
    front_BV = torch.arange(num_virtual, device=device).expand(num_rows, -1)
    is_unused_BK = (plan.segment_BK < 0) & plan.moves_rows
    moved_BK = (plan.kept_BK + num_virtual).masked_fill(is_unused_BK, 0)
    kept_BK = torch.cat([front_BV, moved_BK], dim=1)
    first_B = wide * torch.arange(num_rows, device=device)
    front_R = (first_B[:, None] + front_BV).reshape(-1)
    slot_R = torch.cat([front_R, _moved(plan.slot_R, num_slots, num_virtual)]).sort().values
    row_R, num_tokens = slot_R // wide, plan.num_tokens + num_virtual
    is_none_L = plan.label_slot_L < 0
    label_slot_L = _moved(plan.label_slot_L, num_slots, num_virtual).masked_fill(is_none_L, -1)
    return replace(
        plan,
        num_tokens=num_tokens,
        kept_BK=kept_BK,
        segment_BK=torch.cat([torch.zeros_like(front_BV), plan.segment_BK], dim=1),
        slot_R=slot_R,
        position_R=kept_BK.reshape(-1)[slot_R] + num_tokens * row_R,
        label_slot_L=label_slot_L,
        label_position_L=_moved(plan.label_position_L, plan.num_tokens, num_virtual),
        # Read only where a row holds several samples.
        run_lengths=(),
        token_run_lengths=(),
        sets=tuple(behind_virtual_tokens(one, num_virtual) for one in plan.sets),
    )


def _moved(flat: Tensor, width: int, num_virtual: int) -> Tensor:
    """Return flat indices into rows that are wider by what stands in front."""
    return flat + num_virtual * (flat // width + 1)
