"""The head's loss where a slot predicts several targets: its logits are made once.

Shapes: L targets, U slots that predict something, M targets of a slot at most, C slots of one
chunk, H hidden, V vocabulary.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.entropy import entropy_of
from regate_ds.algorithm.executions.patches import Patches
from regate_ds.algorithm.loss import (
    CHUNK,
    UNCHANGED,
    HeadGradients,
    LogitChange,
    head_logits,
    precise_dtype,
)

_NONE = -1


def summed_patch_loss(  # noqa: PLR0913 (a head in three parts)
    hidden_UH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_L: Tensor,
    patches: Patches,
    change: LogitChange = UNCHANGED,
    *,
    with_entropy: bool = False,
    top1_L: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what ``summed_loss`` does of the targets of these slots.

    The gradient is computed here, as there, and the backward pass can run once.
    """
    cell_L, num_slots = patches.cell_L, len(hidden_UH)
    target_UM = targets_L.new_full((num_slots, patches.size), _NONE)
    target_UM.view(-1)[cell_L] = targets_L
    top1_UM = None if top1_L is None else torch.zeros_like(target_UM, dtype=torch.bool)
    how = (change, torch.is_grad_enabled(), with_entropy, top1_UM)
    total, losses_UM, entropy_U = _SummedPatchLoss.apply(
        hidden_UH, weight_VH, bias_V, target_UM, how
    )
    if top1_L is not None and top1_UM is not None:
        top1_L.copy_(top1_UM.view(-1)[cell_L])
    entropy_L = entropy_U[cell_L // patches.size] if with_entropy else None
    return total, losses_UM.view(-1)[cell_L], entropy_L


class _SummedPatchLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 (autograd fixes the form)
        ctx: Any,
        hidden_UH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_UM: Tensor,
        how: tuple[LogitChange, bool, bool, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        change, with_grad, with_entropy, top1_UM = how
        wants = [with_grad and wanted for wanted in ctx.needs_input_grad[:3]]
        sums = HeadGradients(hidden_UH, weight_VH, bias_V, wants)
        losses_UM = hidden_UH.new_zeros(target_UM.shape, dtype=precise_dtype(hidden_UH))
        entropies = [losses_UM.new_zeros(0)]
        for start in range(0, len(target_UM), CHUNK):
            rows = slice(start, start + CHUNK)
            h_CH, target_CM = hidden_UH[rows], target_UM[rows]
            is_target_CM, target_CM = target_CM != _NONE, target_CM.clamp(min=0)
            logits_CV = change.apply(head_logits(h_CH, weight_VH, bias_V))
            top_C = logits_CV.amax(dim=1)
            at_target_CM = logits_CV.gather(1, target_CM)
            if with_entropy:
                entropies.append(entropy_of(logits_CV))
            if top1_UM is not None:
                top1_UM[rows] = at_target_CM >= top_C[:, None]
            slope_CV = change.slope(logits_CV) if any(wants) else 1.0
            # In place: logits, then their exponentials, then the loss's gradient by the logits.
            residual_CV = logits_CV.sub_(top_C[:, None]).exp_()
            sum_C = residual_CV.sum(dim=1)
            losses_CM = (sum_C.log() + top_C)[:, None] - at_target_CM
            losses_UM[rows] = losses_CM.masked_fill(~is_target_CM, 0.0)
            if any(wants):
                share_CM = is_target_CM.to(residual_CV.dtype)
                residual_CV.mul_((share_CM.sum(dim=1) / sum_C)[:, None])
                residual_CV.scatter_add_(1, target_CM, -share_CM)
                if change != UNCHANGED:
                    residual_CV.mul_(slope_CV)
                sums.add(start, h_CH, residual_CV.to(hidden_UH.dtype))
        ctx.gradients = sums.finished()
        entropy_U = torch.cat(entropies)
        ctx.mark_non_differentiable(losses_UM, entropy_U)
        return losses_UM.sum(), losses_UM, entropy_U

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "summed_patch_loss goes backward once, and its gradients are gone; for more passes "
                "use token_losses"
            )
        # Free the gradients: the head's is [V, H], and the loss may outlive this step.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(grads[0].to(g.dtype)) for g in gradients]
        return (*scaled, None, None)
