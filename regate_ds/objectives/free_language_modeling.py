"""Free language modelling (arXiv 2303.14038): every token is predicted from both of its sides.

Shapes: B rows, T tokens, P patches before them, S = P + T, M places that queries read, H width.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.algorithm.draw import generator
from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.objectives.contract import Inputs, TermLosses, TokenRows
from regate_ds.objectives.parts import Main, TiedHead, next_token_loss, num_told
from regate_ds.objectives.position_queries import PositionQueries, Streams

RIGHT, LEFT, SPANS = "left_to_right", "right_to_left", "spans"


@dataclass(frozen=True, kw_only=True)
class FreeLanguageModeling:
    """One decoder reads each row in both directions; queries join what they know around a span.

    Each token has a span of its own that holds it. Its query reads what the left-to-right stream
    has before the span and the right-to-left stream behind it, and the pictures. The loss is the
    mean of the two streams' own and the queries'.
    """

    longest_span: int = 5
    """The length of a token's span is drawn from 1 to this, and its place in it as well."""

    query_layers: int = 2
    """Layers of the queries; each reads the streams once."""

    query_heads: int = 4
    """Heads of a layer of the queries."""

    def __post_init__(self) -> None:
        names = ("longest_span", "query_layers", "query_heads")
        refuse_knobs(
            self, lambda: [(name, getattr(self, name) >= 1, "must be at least 1") for name in names]
        )

    @property
    def weights(self) -> dict[str, float]:
        return {RIGHT: 1 / 3, LEFT: 1 / 3, SPANS: 1 / 3}

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def takes_pictures(self) -> bool:
        return True

    @property
    def helper_divisor(self) -> None:
        return None

    def draw(self, rows: TokenRows, inputs: Inputs, *, seed: int, step: int) -> Spans:
        del inputs
        first_BT, last_BT = torch.zeros_like(rows.ids_BT), torch.zeros_like(rows.ids_BT)
        for row, key in enumerate(rows.keys):
            draws, num = generator(seed, step, key), int(rows.is_real_BT[row].sum())
            length_T = torch.randint(1, self.longest_span + 1, (num,), generator=draws)
            before_T = (torch.rand(num, generator=draws) * length_T).long()
            first_T = torch.arange(num) - before_T
            first_BT[row, :num] = first_T.clamp(min=0)
            last_BT[row, :num] = (first_T + length_T - 1).clamp(max=num - 1)
        num_by_streams, num_real = num_told(rows), int(rows.is_real_BT.sum())
        counts = {RIGHT: num_by_streams, LEFT: num_by_streams, SPANS: num_real}
        return Spans(first_BT, last_BT, counts)

    def build(
        self, main: nn.Module, helper: nn.Module | None, inputs: Inputs
    ) -> FreeLanguageModelingModule:
        assert helper is None
        return FreeLanguageModelingModule(self, main, inputs)


@dataclass(frozen=True)
class Spans:
    """The first and the last position of each token's span, int64 [B, T]; any at padding."""

    first_BT: Tensor
    last_BT: Tensor
    counts: dict[str, int]

    def to(self, device: torch.device) -> Spans:
        return Spans(self.first_BT.to(device), self.last_BT.to(device), self.counts)


class FreeLanguageModelingModule(nn.Module):
    """A decoder, run once in each direction, and queries that read both streams."""

    def __init__(self, config: FreeLanguageModeling, main: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.main = Main(main, inputs)
        self.head = TiedHead(self.main.width, self.main.embedding_width, inputs.num_tokens)
        self.queries = PositionQueries(
            self.main.width, num_layers=config.query_layers, num_heads=config.query_heads
        )

    def forward(self, rows: TokenRows, draw: Spans) -> TermLosses:
        ids, real, table = rows.ids_BT, rows.is_real_BT, self.main.embedding.weight
        streams = self.streams(rows)
        states_BTH = self.queries(streams, draw.first_BT, draw.last_BT)
        targets = ids.masked_fill(~real, -100).flatten()
        logits = self.head(states_BTH, table).flatten(0, 1)
        turned_ids = ids.gather(1, streams.turned_BT)
        return {
            RIGHT: next_token_loss(streams.right_BSH, ids, real, self.head, table),
            LEFT: next_token_loss(streams.left_BSH, turned_ids, real, self.head, table),
            SPANS: F.cross_entropy(logits, targets, reduction="sum"),
        }

    def streams(self, rows: TokenRows) -> Streams:
        """Run the decoder once over both directions; padding stays behind in either."""
        ids, real, patches = rows.ids_BT, rows.is_real_BT, rows.patches_BPF
        place_BT = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        turned_BT = torch.where(real, real.sum(dim=1, keepdim=True) - 1 - place_BT, place_BT)
        both = None if patches is None else torch.cat([patches, patches])
        states_2BSH = self.main(
            torch.cat([ids, ids.gather(1, turned_BT)]),
            torch.cat([real, real]),
            both,
            torch.cat([place_BT, turned_BT]),
        )
        right_BSH, left_BSH = states_2BSH.chunk(2)
        return Streams(right_BSH, left_BSH, turned_BT, real)
