"""Latent attention (DeepSeek's) has a rotary table of its own, and asks it for angles itself.

In a gated layer the table answers with those of kept slots. Each call of such a layer says which
these are just before it runs, in recomputation, too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.megatron.local.plan import LocalPlan

TABLES = ("RotaryEmbedding", "YarnRotaryEmbedding")
"""Megatron-core's classes of such tables."""


class OwnAngles:
    """The tables of a chunk's gated layers. ``local`` is the plan of the call that comes next."""

    def __init__(self) -> None:
        self.local: LocalPlan | None = None
        """None where full rows are attended to."""

    def rebind(self, attention: nn.Module, attachment: Attachment) -> None:
        """Make a gated layer's table answer for the plan, if the layer has a table of its own."""
        table = getattr(attention, "rotary_pos_emb", None)
        if table is not None:
            attachment.rebind_forward(table, self._answer, table=table)

    def _answer(self, host_forward: Any, *args: Any, table: Any, **kwargs: Any) -> Any:
        if self.local is None:
            return host_forward(*args, **kwargs)
        found = table.get_emb(self.local.plan.num_tokens)
        # Yarn also says by how much sine and cosine are scaled.
        table_T11D, *scale = found if isinstance(found, tuple) else (found,)
        angles_SB1D: Tensor = table_T11D[:, 0, 0][self.local.rotary_position].unsqueeze(2)
        return (angles_SB1D, *scale) if scale else angles_SB1D
