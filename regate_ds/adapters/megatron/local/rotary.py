"""The rotary angles of kept slots, for each kind of positions that a GPTModel may have.

The host computes its own angles for the rows of ungated layers, and cuts them over context ranks.
Kept slots are divided over context ranks anew, so their angles are taken from the whole table.

Shapes: B rows, T positions, S slots of this context rank, D values of an angle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regate_ds.adapters.megatron.local.plan import LocalPlan


class _Alone:
    """Stands for a context group of one rank: the host then cuts nothing off the table."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _by_position(gpt: Any, local: LocalPlan, _: Tensor | None) -> Tensor:
    """One axis: positions count from the start of a sample."""
    table = gpt.rotary_pos_emb.get_emb(local.plan.num_tokens)
    return table[:, 0, 0][local.rotary_position]


def _by_scaled_position(gpt: Any, local: LocalPlan, _: Tensor | None) -> Tensor:
    """One axis with yarn's frequencies; attention itself reads the factor of sine and cosine."""
    table, _ = gpt.rotary_pos_emb.get_emb(local.plan.num_tokens)
    return table[:, 0, 0][local.rotary_position]


def _by_axes(gpt: Any, local: LocalPlan, position_ids: Tensor | None) -> Tensor:
    """Time, height and width, which the model is given for every position."""
    table_TB1D = gpt.rotary_pos_emb(position_ids, gpt.mrope_section, cp_group=_Alone())
    return table_TB1D[:, :, 0].transpose(0, 1).flatten(0, 1)[local.source]


def require_axes(gpt: Any, local: LocalPlan, position_ids: Tensor | None) -> None:
    """Refuse, by ValueError, a call without the positions that the model's angles are made of."""
    expected = (3, len(local.plan.kept_BK), local.plan.num_tokens)
    found = None if position_ids is None else tuple(position_ids.shape)
    if gpt.position_embedding_type == "mrope" and found != expected:
        raise ValueError(
            f"the model is called with position_ids {found}, but position_embedding_type='mrope' "
            f"needs {expected} [3, rows, positions] on every stage; with context parallelism, too, "
            "of whole rows"
        )


@dataclass(frozen=True)
class Positions:
    """One kind of positions."""

    table: str
    """Megatron-core's class of the rotary table; another one may mean something else by it."""

    angles: Callable[[Any, LocalPlan, Tensor | None], Tensor]
    """Returns the angles [S, B, D] of kept slots."""


KINDS = {
    "rope": Positions("RotaryEmbedding", _by_position),
    "yarn": Positions("YarnRotaryEmbedding", _by_scaled_position),
    "mrope": Positions("MultimodalRotaryEmbedding", _by_axes),
}
"""By ``position_embedding_type``."""


def kept_angles(gpt: Any, local: LocalPlan, position_ids: Tensor | None) -> Tensor | None:
    """Return the angles [S, B, 1, D] of this context rank's kept slots; None if the model has none.

    Ragged rows are one row of the slots of all context ranks, of which the host takes its part.
    position_ids: what the model was called with.
    """
    kind = KINDS.get(gpt.position_embedding_type)
    return None if kind is None else kind.angles(gpt, local, position_ids).unsqueeze(2)
