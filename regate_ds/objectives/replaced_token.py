"""ELECTRA (arXiv 2003.10555): tell which tokens a small generator has put in.

Shapes: B rows, T tokens, N positions one behind another, H width.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.objectives.contract import Inputs, TermLosses, TokenRows
from regate_ds.objectives.parts import Main, wide
from regate_ds.objectives.picking import Picked, Picking, pick, share_rule
from regate_ds.objectives.proposals import Helper, require_helper

GENERATOR, REPLACED = "generator", "replaced"


@dataclass(frozen=True, kw_only=True)
class ReplacedToken:
    """The generator guesses masked tokens; the main model says of each token whether it is false.

    A token that the generator happens to guess right counts as not replaced.
    """

    pick_share: float = 0.15
    """Share of a row's positions that the generator must guess."""

    mask_share: float = 0.85
    """Share of those that are masked in what the generator reads; the others stay as they are."""

    generator_divisor: int = 4
    """How many times narrower the generator is than the main model."""

    weight: float = 50.0
    """Weight of the main model's loss; the generator's has 1."""

    def __post_init__(self) -> None:
        refuse_knobs(
            self,
            lambda: [
                share_rule(self, "pick_share"),
                share_rule(self, "mask_share"),
                ("generator_divisor", self.generator_divisor >= 1, "must be at least 1"),
                ("weight", self.weight > 0.0, "must be above 0"),
            ],
        )

    @property
    def weights(self) -> dict[str, float]:
        return {GENERATOR: 1.0, REPLACED: self.weight}

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def takes_pictures(self) -> bool:
        return False

    @property
    def helper_divisor(self) -> int:
        return self.generator_divisor

    def draw(self, rows: TokenRows, inputs: Inputs, *, seed: int, step: int) -> Picked:
        picking = Picking(share=self.pick_share, guess=GENERATOR, judge=REPLACED)
        return pick(rows, inputs, picking, seed=seed, step=step)

    def build(
        self, main: nn.Module, helper: nn.Module | None, inputs: Inputs
    ) -> ReplacedTokenModule:
        return ReplacedTokenModule(self, main, require_helper(helper), inputs)


class ReplacedTokenModule(nn.Module):
    """Generator and discriminator in one module, with one table of token embeddings."""

    def __init__(
        self, config: ReplacedToken, main: nn.Module, helper: nn.Module, inputs: Inputs
    ) -> None:
        super().__init__()
        self.main = Main(main, inputs)
        self.helper = Helper(helper, self.main, inputs, config.mask_share)
        width = self.main.width
        self.judge = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, rows: TokenRows, draw: Picked) -> TermLosses:
        proposal = self.helper(rows, draw, self.main.embedding)
        seen_BT = proposal.seen_BT
        states_BTH = self.main(seen_BT, rows.is_real_BT)
        score_N = wide(self.judge(states_BTH.flatten(0, 1)[draw.real_N])[:, 0])
        is_false_N = (seen_BT != rows.ids_BT).flatten()[draw.real_N]
        judged = F.binary_cross_entropy_with_logits(
            score_N, is_false_N.to(score_N.dtype), reduction="sum"
        )
        return {GENERATOR: proposal.loss, REPLACED: judged}
