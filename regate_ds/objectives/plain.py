"""What the other objectives are compared with: plain masked and plain causal language modelling.

Shapes: B rows, T tokens, P patches, S = P + T, N positions one behind another, U draws.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.objectives.contract import Inputs, TermLosses, TokenRows
from regate_ds.objectives.parts import Main, TiedHead, next_token_loss, num_told
from regate_ds.objectives.picking import Picked, Picking, pick, share_rule

MASKED, NEXT = "masked", "next"


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Masked language modelling as BERT's (arXiv 1810.04805): some positions are to be guessed."""

    pick_share: float = 0.15
    """Share of a row's positions that are to be guessed."""

    mask_share: float = 0.8
    """Share of those that are masked; one half of the others is a random token, the rest stays."""

    def __post_init__(self) -> None:
        rules = ("pick_share", "mask_share")
        refuse_knobs(self, lambda: [share_rule(self, name) for name in rules])

    @property
    def weights(self) -> dict[str, float]:
        return {MASKED: 1.0}

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def takes_pictures(self) -> bool:
        return True

    @property
    def helper_divisor(self) -> None:
        return None

    def draw(self, rows: TokenRows, inputs: Inputs, *, seed: int, step: int) -> Picked:
        picking = Picking(share=self.pick_share, guess=MASKED)
        return pick(rows, inputs, picking, seed=seed, step=step)

    def build(self, main: nn.Module, helper: nn.Module | None, inputs: Inputs) -> MaskedModule:
        assert helper is None
        return MaskedModule(self, main, inputs)


class MaskedModule(nn.Module):
    """An encoder with a head that scores all tokens."""

    def __init__(self, config: Masked, main: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        self.main = Main(main, inputs)
        self.head = TiedHead(self.main.width, self.main.embedding_width, inputs.num_tokens)

    def forward(self, rows: TokenRows, draw: Picked) -> TermLosses:
        read_BT = corrupted(rows, draw, self.config.mask_share, self.inputs)
        states_BSH = self.main(read_BT, rows.is_real_BT, rows.patches_BPF)
        states_BTH = states_BSH[:, rows.num_patches :]
        logits_NV = self.head(states_BTH.flatten(0, 1)[draw.picked_N], self.main.embedding.weight)
        truth_N = rows.ids_BT.flatten()[draw.picked_N]
        return {MASKED: F.cross_entropy(logits_NV, truth_N, reduction="sum")}


def corrupted(rows: TokenRows, draw: Picked, mask_share: float, inputs: Inputs) -> Tensor:
    """Return the rows' ids as they are read: masked, random or as they are where picked."""
    is_masked_BT = draw.mask_draw_BT < mask_share
    is_random_BT = (draw.mask_draw_BT < (1.0 + mask_share) / 2) & ~is_masked_BT
    random_BT = (draw.sample_draw_BTU[:, :, 0] * inputs.num_tokens).long()
    read_BT = torch.where(is_random_BT, random_BT.clamp(max=inputs.num_tokens - 1), rows.ids_BT)
    return read_BT.masked_fill(is_masked_BT, inputs.mask_id)


@dataclass(frozen=True, kw_only=True)
class Causal:
    """Causal language modelling: each position tells the next token."""

    @property
    def weights(self) -> dict[str, float]:
        return {NEXT: 1.0}

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def takes_pictures(self) -> bool:
        return True

    @property
    def helper_divisor(self) -> None:
        return None

    def draw(self, rows: TokenRows, inputs: Inputs, *, seed: int, step: int) -> Told:
        return Told({NEXT: num_told(rows)})

    def build(self, main: nn.Module, helper: nn.Module | None, inputs: Inputs) -> CausalModule:
        assert helper is None
        return CausalModule(main, inputs)


@dataclass(frozen=True)
class Told:
    """Nothing is drawn."""

    counts: dict[str, int]

    def to(self, device: torch.device) -> Told:
        return self


class CausalModule(nn.Module):
    """A decoder with a head that scores all tokens."""

    def __init__(self, main: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.main = Main(main, inputs)
        self.head = TiedHead(self.main.width, self.main.embedding_width, inputs.num_tokens)

    def forward(self, rows: TokenRows, draw: Told) -> TermLosses:
        states_BSH = self.main(rows.ids_BT, rows.is_real_BT, rows.patches_BPF)
        table = self.main.embedding.weight
        return {NEXT: next_token_loss(states_BSH, rows.ids_BT, rows.is_real_BT, self.head, table)}
