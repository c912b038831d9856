"""Cross-entropy of the head at target positions, without ever holding the logits of all of them.

Shapes: L targets, C targets of one chunk, H hidden, V vocabulary. Logits exist for one chunk only.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regate_ds.algorithm.entropy import entropy_of

CHUNK = 256
"""Number of targets whose logits exist at one time: about full speed, at little memory."""


@dataclass(frozen=True, kw_only=True)
class LogitChange:
    """What a model does to its logits behind the head's product."""

    scale: float = 1.0
    """Factor of all logits."""

    cap: float | None = None
    """Then a logit x becomes ``cap * tanh(x / cap)`` (soft capping, Gemma 2, arXiv 2408.00118)."""

    def apply(self, logits_CV: Tensor) -> Tensor:
        """Return the changed logits."""
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        return logits_CV if self.cap is None else self.cap * torch.tanh(logits_CV / self.cap)

    def slope(self, changed_CV: Tensor) -> Tensor | float:
        """Return the derivative of a changed logit by the head's product."""
        if self.cap is None:
            return self.scale
        return (1.0 - (changed_CV / self.cap).square()) * self.scale


UNCHANGED = LogitChange()


def summed_loss(  # noqa: PLR0913 (a head in three parts)
    hidden_LH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_L: Tensor,
    share_L: Tensor | None = None,
    change: LogitChange = UNCHANGED,
    *,
    with_entropy: bool = False,
    top1_L: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the sum of the targets' losses in nats, the losses [L] and the entropies [L] of the
    student's distributions there, both detached. At least fp32.

    share_L: weight of each target in the sum; None is 1 for all.
    change: what the model does to its logits.
    with_entropy: False gives None for the entropies. The losses are the same bit for bit.
    top1_L: bool, to be filled: whether no token is likelier than the target; None leaves it out.

    The weights are known, so the gradient is known before the backward pass up to one scalar.
    It is computed here, chunk by chunk, while the logits exist; the backward pass only scales it,
    and can run once.
    """
    how = (change, torch.is_grad_enabled(), with_entropy, top1_L)
    return _SummedLoss.apply(hidden_LH, weight_VH, bias_V, targets_L, share_L, how)


def token_losses(  # noqa: PLR0913 (a head in three parts)
    hidden_LH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_L: Tensor,
    change: LogitChange = UNCHANGED,
    *,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the differentiable loss of each target [L] in nats, for a loss of the user's own, and
    the entropies as ``summed_loss`` does.

    The backward pass recomputes each chunk, because the weight of a target is known only then:
    slower than ``summed_loss``, at the same memory.
    """
    head = (weight_VH, bias_V)
    found = [
        checkpoint(_chunk_losses, h, *head, t, change, with_entropy, use_reentrant=False)
        for h, t in zip(hidden_LH.split(CHUNK), targets_L.split(CHUNK), strict=True)
    ]
    losses, entropies = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(entropies) if with_entropy else None


def precise_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def head_logits(h_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(h_CH, weight_VH, bias_V).to(precise_dtype(h_CH))


def _chunk_losses(  # noqa: PLR0913 (as token_losses)
    h_CH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_C: Tensor,
    change: LogitChange,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    logits_CV = change.apply(head_logits(h_CH, weight_VH, bias_V))
    losses_C = torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="none")
    return losses_C, entropy_of(logits_CV) if with_entropy else None


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 (autograd fixes the form)
        ctx: Any,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_L: Tensor,
        share_L: Tensor | None,
        how: tuple[LogitChange, bool, bool, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        change, with_grad, with_entropy, top1_L = how
        wants = [with_grad and wanted for wanted in ctx.needs_input_grad[:3]]
        sums = HeadGradients(hidden_LH, weight_VH, bias_V, wants)
        losses, entropies = [], []
        for start in range(0, len(targets_L), CHUNK):
            h_CH, targets_C = hidden_LH[start : start + CHUNK], targets_L[start : start + CHUNK]
            logits_CV = change.apply(head_logits(h_CH, weight_VH, bias_V))
            top_C = logits_CV.amax(dim=1)
            at_target_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1)
            if with_entropy:
                entropies.append(entropy_of(logits_CV))
            if top1_L is not None:
                top1_L[start : start + CHUNK] = at_target_C >= top_C
            slope_CV = change.slope(logits_CV) if any(wants) else 1.0
            # In place: logits, then their exponentials, then the loss's gradient by the logits.
            residual_CV = logits_CV.sub_(top_C[:, None]).exp_()
            sum_C = residual_CV.sum(dim=1)
            losses.append(sum_C.log() + top_C - at_target_C)
            if any(wants):
                residual_CV.div_(sum_C[:, None])
                residual_CV.scatter_add_(
                    1, targets_C[:, None], -torch.ones_like(at_target_C)[:, None]
                )
                if change != UNCHANGED:
                    residual_CV.mul_(slope_CV)
                if share_L is not None:
                    residual_CV.mul_(share_L[start : start + CHUNK, None])
                sums.add(start, h_CH, residual_CV.to(hidden_LH.dtype))
        ctx.gradients = sums.finished()
        none = hidden_LH.new_zeros(0, dtype=precise_dtype(hidden_LH))
        losses_L, entropy_L = torch.cat([none, *losses]), torch.cat([none, *entropies])
        ctx.mark_non_differentiable(losses_L, entropy_L)
        summed = losses_L if share_L is None else losses_L * share_L
        return summed.sum(), losses_L, entropy_L if with_entropy else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "summed_loss goes backward once, and its gradients are gone; for more passes use "
                "token_losses"
            )
        # Free the gradients: the head's is [V, H], and the loss may outlive this step.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(grads[0].to(g.dtype)) for g in gradients]
        return (*scaled, None, None, None)


class HeadGradients:
    """The gradients of the summed loss, added up over chunks; the head's in at least fp32."""

    def __init__(
        self, hidden_LH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, wants: list[bool]
    ) -> None:
        precise = precise_dtype(hidden_LH)
        self._weight_VH = weight_VH
        self.hidden = torch.empty_like(hidden_LH) if wants[0] else None
        self.weight = torch.zeros_like(weight_VH, dtype=precise) if wants[1] else None
        self.bias = None
        if wants[2] and bias_V is not None:
            self.bias = torch.zeros_like(bias_V, dtype=precise)

    def add(self, start: int, h_CH: Tensor, residual_CV: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[start : start + len(h_CH)] = residual_CV @ self._weight_VH
        if self.weight is not None and self.weight.dtype == h_CH.dtype:
            self.weight.addmm_(residual_CV.mT, h_CH)
        elif self.weight is not None:
            self.weight += residual_CV.mT @ h_CH
        if self.bias is not None:
            self.bias += residual_CV.sum(dim=0)

    def finished(self) -> list[Tensor | None]:
        dtype = self._weight_VH.dtype
        return [
            self.hidden,
            *(None if g is None else g.to(dtype) for g in (self.weight, self.bias)),
        ]
