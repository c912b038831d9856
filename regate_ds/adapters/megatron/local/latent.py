"""Latent attention (DeepSeek's) has a rotary table of its own, and asks it for angles itself.

In a gated layer the table answers with those of kept slots. Each call of such a layer says which
these are just before it runs, in recomputation, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
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


def latent_problems(chunks: Sequence[Any], host: Any) -> list[tuple[bool, str]]:
    """Return whether each problem of latent attention under tensor parallelism is there.

    The gradients are then the host's own that are wrong, in dense steps and without us, too.
    """
    if not host.multi_latent_attention or host.tensor_model_parallel_size == 1:
        return []
    layers = [layer.self_attention for gpt in chunks for layer in gpt.decoder.layers]
    has_cut = any(isinstance(x.linear_kv_down_proj, ColumnParallelLinear) for x in layers)
    size = host.tensor_model_parallel_size
    what = f"multi_latent_attention=True with tensor_model_parallel_size={size}"
    return [
        (
            not host.sequence_parallel,
            f"{what} and sequence_parallel=False: Megatron-core's own gradients are then wrong, "
            "those of q_layernorm added up once a rank; set sequence_parallel=True",
        ),
        (
            has_cut,
            f"{what} and linear_kv_down_proj of class ColumnParallelLinear: Megatron-core itself "
            "then leaves out the other tensor ranks' gradient of the keys' rotary part; build the "
            "layers with Transformer Engine's spec, whose down projections are whole",
        ),
    ]
