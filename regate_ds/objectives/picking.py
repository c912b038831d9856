"""Pick positions of rows, and sample tokens from a distribution by numbers drawn before.

Shapes: B rows, T tokens, N positions one behind another, V inputs, U draws of a position.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.draw import generator
from regate_ds.algorithm.knobs import Rule
from regate_ds.objectives.contract import Inputs, TokenRows


@dataclass(frozen=True, kw_only=True)
class Picking:
    """How many positions are picked, and the terms that run over them."""

    share: float

    num_draws: int = 1
    """Draws of each position, beside that which masks it."""

    guess: str
    """Name of the term that runs over the picked positions."""

    judge: str | None = None
    """Name of the term that runs over all positions but padding; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class Picked:
    """Positions that the helper must guess, and the numbers that decide what it samples."""

    picked_N: Tensor
    """int64: places in the flattened [B * T], in reading order."""

    real_N: Tensor
    """int64: places of all positions that are no padding."""

    mask_draw_BT: Tensor
    """float32 in [0, 1): decides whether a picked position is masked; 2 where none is picked."""

    sample_draw_BTU: Tensor
    """float32 in [0, 1)."""

    picking: Picking

    @property
    def counts(self) -> dict[str, int]:
        found = {self.picking.guess: len(self.picked_N)}
        judge = self.picking.judge
        return found if judge is None else {**found, judge: len(self.real_N)}

    def to(self, device: torch.device) -> Picked:
        return Picked(
            picked_N=self.picked_N.to(device),
            real_N=self.real_N.to(device),
            mask_draw_BT=self.mask_draw_BT.to(device),
            sample_draw_BTU=self.sample_draw_BTU.to(device),
            picking=self.picking,
        )


def pick(rows: TokenRows, inputs: Inputs, picking: Picking, *, seed: int, step: int) -> Picked:
    """Pick a share of each row's positions that hold text, at least one where there is one."""
    special = torch.tensor(inputs.special_ids)
    is_text_BT = rows.is_real_BT & ~torch.isin(rows.ids_BT, special)
    mask_draw_BT = torch.full(rows.ids_BT.shape, 2.0)
    sample_draw_BTU = torch.zeros(*rows.ids_BT.shape, picking.num_draws)
    for row, key in enumerate(rows.keys):
        draws = generator(seed, step, key)
        text_N = is_text_BT[row].nonzero()[:, 0]
        order_N = torch.rand(len(text_N), generator=draws).argsort(stable=True)
        num_picked = min(len(text_N), max(1, round(picking.share * len(text_N))))
        mask_draw_BT[row, text_N[order_N[:num_picked]]] = torch.rand(num_picked, generator=draws)
        # A row's draws must not depend on the padding that its neighbours ask for.
        num_real = int(rows.is_real_BT[row].sum())
        sample_draw_BTU[row, :num_real] = torch.rand(num_real, picking.num_draws, generator=draws)
    return Picked(
        picked_N=(mask_draw_BT.flatten() < 2.0).nonzero()[:, 0],
        real_N=rows.is_real_BT.flatten().nonzero()[:, 0],
        mask_draw_BT=mask_draw_BT,
        sample_draw_BTU=sample_draw_BTU,
        picking=picking,
    )


def sample_tokens(logits_NV: Tensor, draw_NU: Tensor, never: Sequence[int]) -> Tensor:
    """Sample U tokens at each position, at temperature 1 and independently; no gradient passes.

    A token is the first whose cumulated probability is above the draw. So one number decides a
    token, whatever the device and the number of ranks.

    never: ids of probability 0. Returns int64 [N, U].
    """
    with torch.no_grad():
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        logits_NV = logits_NV.to(wide, copy=True)
        logits_NV[:, list(never)] = -torch.inf
        cumulated_NV = logits_NV.softmax(dim=1).cumsum(dim=1)
        level_NU = draw_NU.to(wide) * cumulated_NV[:, -1:]
        found_NU = torch.searchsorted(cumulated_NV, level_NU.contiguous(), right=True)
        return found_NU.clamp(max=logits_NV.shape[1] - 1)


def share_rule(settings: Any, name: str) -> Rule:
    """Return the rule of a share that may be 1 but not 0."""
    return (name, 0.0 < getattr(settings, name) <= 1.0, "must be above 0 and at most 1")
