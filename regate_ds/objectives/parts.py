"""The parts that objectives are put together from: models that read rows, and heads on them.

Shapes: B rows, T tokens, P patches, F numbers of a patch, H width of a model, E width of the
embeddings, N positions one behind another, V vocabulary.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.objectives.contract import Inputs, TokenRows


class Main(nn.Module):
    """The main model: it reads text, with or without patches before it."""

    def __init__(self, body: Any, inputs: Inputs) -> None:
        """Wrap a model without a head."""
        super().__init__()
        self.body = body
        self.width: int = body.config.hidden_size
        size = inputs.patch_size
        self.patches = None if size is None else nn.Linear(size, self.embedding_width)

    @property
    def embedding(self) -> nn.Embedding:
        return self.body.get_input_embeddings()

    @property
    def embedding_width(self) -> int:
        return self.embedding.weight.shape[1]

    def forward(
        self,
        ids_BT: Tensor,
        is_real_BT: Tensor,
        patches_BPF: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the states [B, P + T, H]; those of the patches come first.

        positions_BT: numbers of the text's positions behind the patches; None counts from 0.
        """
        if patches_BPF is None:
            inputs: dict[str, Tensor] = {"input_ids": ids_BT}
            num_patches = 0
        else:
            assert self.patches is not None
            text_BTE, patches = self.embedding(ids_BT), self.patches
            before_BPE = patches(patches_BPF.to(patches.weight.dtype))
            inputs = {"inputs_embeds": torch.cat([before_BPE, text_BTE], dim=1)}
            num_patches = before_BPE.shape[1]
        if positions_BT is not None:
            before_P = torch.arange(num_patches, device=ids_BT.device).expand(len(ids_BT), -1)
            inputs["position_ids"] = torch.cat([before_P, positions_BT + num_patches], dim=1)
        is_read = F.pad(is_real_BT, (num_patches, 0), value=True).long()
        return self.body(attention_mask=is_read, **inputs).last_hidden_state


class TiedHead(nn.Module):
    """Scores of all tokens, at least float32: a small layer, then the embedding table itself."""

    def __init__(self, width: int, embedding_width: int, num_tokens: int) -> None:
        super().__init__()
        self.layer = Query(width, embedding_width)
        self.bias = nn.Parameter(torch.zeros(num_tokens))

    def forward(self, states_NH: Tensor, embedding_VE: Tensor) -> Tensor:
        return wide(F.linear(self.layer(states_NH), embedding_VE, self.bias))


class Query(nn.Sequential):
    """Turns a state into a vector of the embeddings' width."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__(
            nn.Linear(width, embedding_width), nn.GELU(), nn.LayerNorm(embedding_width)
        )


def wide(scores: Tensor) -> Tensor:
    """Return scores in at least float32, in which losses are summed."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def next_token_loss(
    states_BSH: Tensor, targets_BT: Tensor, is_real_BT: Tensor, head: TiedHead, embedding_VE: Tensor
) -> Tensor:
    """Return the summed loss of each token, told by the position before it.

    With P = S - T patches before the text, the last of them tells the first token; without, it is
    not told.
    """
    num_patches = states_BSH.shape[1] - targets_BT.shape[1]
    first = first_told(num_patches)
    before = states_BSH[:, num_patches + first - 1 : -1]
    targets = targets_BT.masked_fill(~is_real_BT, -100)[:, first:]
    logits = head(before, embedding_VE)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def num_told(rows: TokenRows) -> int:
    """Return the number of tokens that have a position before them."""
    return int(rows.is_real_BT[:, first_told(rows.num_patches) :].sum())


def first_told(num_patches: int) -> int:
    """Return the first token that has a position before it."""
    return 0 if num_patches else 1
