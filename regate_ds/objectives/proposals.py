"""What a helper proposes: guesses of masked tokens, and tokens sampled from them.

Shapes: B rows, T tokens, N positions one behind another, V vocabulary, H width, U draws.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.objectives.contract import Inputs, TokenRows
from regate_ds.objectives.parts import Main, TiedHead
from regate_ds.objectives.picking import Picked, sample_tokens


@dataclass(frozen=True)
class Proposal:
    """What the helper makes of masked rows."""

    states_BTH: Tensor
    """The helper's states."""

    loss: Tensor
    """Its summed loss at the picked positions."""

    seen_BT: Tensor
    """int64: the rows' ids, with a token sampled by the helper at each picked position."""


class Helper(nn.Module):
    """A narrower model that guesses tokens; it reads and scores by the main model's embeddings."""

    def __init__(self, body: Any, main: Main, inputs: Inputs, mask_share: float) -> None:
        super().__init__()
        self.inputs, self.mask_share = inputs, mask_share
        own: nn.Embedding = body.get_input_embeddings()
        self.enter = nn.Linear(main.embedding_width, own.embedding_dim)
        # Its own table would never be read, but cost memory and a gradient that is always missing.
        body.set_input_embeddings(nn.Identity())
        self.body = body
        self.head = TiedHead(body.config.hidden_size, main.embedding_width, inputs.num_tokens)

    def forward(self, rows: TokenRows, draw: Picked, embedding: nn.Embedding) -> Proposal:
        """Guess the picked positions of masked rows, and sample tokens for them."""
        is_masked_BT = draw.mask_draw_BT < self.mask_share
        read_BT = rows.ids_BT.masked_fill(is_masked_BT, self.inputs.mask_id)
        states_BTH = self.body(
            inputs_embeds=self.enter(embedding(read_BT)), attention_mask=rows.is_real_BT.long()
        ).last_hidden_state
        logits_NV = self.head(states_BTH.flatten(0, 1)[draw.picked_N], embedding.weight)
        truth_N = rows.ids_BT.flatten()[draw.picked_N]
        loss = F.cross_entropy(logits_NV, truth_N, reduction="sum")
        draw_NU = draw.sample_draw_BTU.flatten(0, 1)[draw.picked_N, :1]
        sampled_N = sample_tokens(logits_NV, draw_NU, self.inputs.special_ids)[:, 0]
        seen_N = rows.ids_BT.flatten().index_copy(0, draw.picked_N, sampled_N)
        return Proposal(states_BTH, loss, seen_N.view_as(rows.ids_BT))


def require_helper(helper: nn.Module | None) -> nn.Module:
    """Return the helper; ValueError if there is none."""
    if helper is None:
        raise ValueError("helper=None: this objective needs a helper model; give one")
    return helper
