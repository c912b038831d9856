"""MC-BERT (arXiv 2006.05744): choose among candidates which token stood here, or none of them.

Shapes: B rows, T tokens, N positions that are no padding, K candidates, V inputs, E width of
the embeddings.
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
from regate_ds.objectives.parts import Main, Query, wide
from regate_ds.objectives.picking import Picked, Picking, pick, sample_tokens, share_rule
from regate_ds.objectives.proposals import Helper, require_helper

CONTROLLER, CHOICE = "controller", "choice"


@dataclass(frozen=True, kw_only=True)
class MultiChoice:
    """A meta controller puts tokens in and proposes candidates; the main model chooses of them.

    Where a token was replaced, the one that stood there is one of the candidates and the right
    choice; elsewhere 'neither' is right, class 0. The other candidates are sampled by the
    controller, neither that token nor the one that is read; one that is sampled again counts once.
    """

    pick_share: float = 0.15
    """Share of a row's positions that the controller must guess."""

    mask_share: float = 0.85
    """Share of those that are masked in what the controller reads."""

    controller_divisor: int = 3
    """How many times narrower the controller is than the main model."""

    candidates: int = 10
    """Number of candidates at each position, beside 'neither'."""

    weight: float = 50.0
    """Weight of the main model's loss; the controller's has 1."""

    def __post_init__(self) -> None:
        refuse_knobs(
            self,
            lambda: [
                share_rule(self, "pick_share"),
                share_rule(self, "mask_share"),
                ("controller_divisor", self.controller_divisor >= 1, "must be at least 1"),
                ("candidates", self.candidates >= 2, "must be at least 2"),
                ("weight", self.weight > 0.0, "must be above 0"),
            ],
        )

    @property
    def weights(self) -> dict[str, float]:
        return {CONTROLLER: 1.0, CHOICE: self.weight}

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def takes_pictures(self) -> bool:
        return False

    @property
    def helper_divisor(self) -> int:
        return self.controller_divisor

    def draw(self, rows: TokenRows, inputs: Inputs, *, seed: int, step: int) -> Picked:
        picking = Picking(
            share=self.pick_share,
            guess=CONTROLLER,
            judge=CHOICE,
            num_draws=1 + self.candidates,
        )
        return pick(rows, inputs, picking, seed=seed, step=step)

    def build(self, main: nn.Module, helper: nn.Module | None, inputs: Inputs) -> MultiChoiceModule:
        free = inputs.num_tokens - len(inputs.special_ids)
        if free < 3:
            raise ValueError(
                f"{free} tokens besides the special ones leave no candidate; give a larger "
                "vocabulary"
            )
        return MultiChoiceModule(self, main, require_helper(helper), inputs)


class MultiChoiceModule(nn.Module):
    """Controller and main model in one module, with one table of token embeddings."""

    def __init__(
        self, config: MultiChoice, main: nn.Module, helper: nn.Module, inputs: Inputs
    ) -> None:
        super().__init__()
        self.main = Main(main, inputs)
        self.helper = Helper(helper, self.main, inputs, config.mask_share)
        self.inputs = inputs
        self.query = Query(self.main.width, self.main.embedding_width)
        self.neither = nn.Parameter(torch.empty(self.main.embedding_width).normal_(std=0.02))

    def forward(self, rows: TokenRows, draw: Picked) -> TermLosses:
        proposal = self.helper(rows, draw, self.main.embedding)
        seen_BT = proposal.seen_BT
        seen_N, truth_N = (ids.flatten()[draw.real_N] for ids in (seen_BT, rows.ids_BT))
        candidates_NK = self._candidates(proposal.states_BTH, draw, seen_N, truth_N)
        states_BTH = self.main(seen_BT, rows.is_real_BT)
        query_NE = self.query(states_BTH.flatten(0, 1)[draw.real_N])
        logits_NC = wide(self._scores(query_NE, candidates_NK))
        chosen = F.cross_entropy(logits_NC, (seen_N != truth_N).long(), reduction="sum")
        return {CONTROLLER: proposal.loss, CHOICE: chosen}

    def _candidates(
        self, states_BTH: Tensor, draw: Picked, seen_N: Tensor, truth_N: Tensor
    ) -> Tensor:
        """Return the candidates of each position; of a replaced one, the truth is the first."""
        with torch.no_grad():
            # The scores do not depend on a candidate's place, so the truth need not be hidden.
            states_NH = states_BTH.flatten(0, 1)[draw.real_N]
            logits_NV = self.helper.head(states_NH, self.main.embedding.weight)
            known_N2 = torch.stack([seen_N, truth_N], dim=1)
            logits_NV = logits_NV.scatter(1, known_N2, -torch.inf)
            draw_NK = draw.sample_draw_BTU.flatten(0, 1)[draw.real_N, 1:]
            sampled_NK = sample_tokens(logits_NV, draw_NK, self.inputs.special_ids)
            first_N = torch.where(seen_N != truth_N, truth_N, sampled_NK[:, 0])
            return torch.cat([first_N[:, None], sampled_NK[:, 1:]], dim=1)

    def _scores(self, query_NE: Tensor, candidates_NK: Tensor) -> Tensor:
        """Return a score for 'neither' and one for each candidate, -inf where it is there twice."""
        neither_N = query_NE @ self.neither
        vectors_NKE = self.main.embedding(candidates_NK)
        scores_NK = torch.einsum("ne,nke->nk", query_NE, vectors_NKE)
        equal_NKK = candidates_NK[:, :, None] == candidates_NK[:, None, :]
        is_again_NK = equal_NKK.tril(diagonal=-1).any(dim=2)
        scores_NK = scores_NK.masked_fill(is_again_NK, -torch.inf)
        return torch.cat([neither_N[:, None], scores_NK], dim=1)
