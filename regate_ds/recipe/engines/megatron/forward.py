"""The dense student's answers to a micro-batch, from the ranks that hold it together.

A micro-batch goes through the stages once, without a schedule: what a stage makes is sent to the
next. No rank needs more of the student than it trains.

Shapes: B rows, T positions, S the positions of this rank's part, N label positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from regate_ds.data.collate import Batch
from regate_ds.recipe.engines.megatron.chunks import context_part, student_chunks
from regate_ds.recipe.engines.megatron.transfer import receive_tensor, send_tensor


def predict_in_stages(chunks: Sequence[nn.Module], batch: Batch) -> tuple[Tensor, Tensor]:
    """Return whether the argmax is right, and the loss in nats, at each label position [N].

    As evaluation/forward.py's: both on the CPU, row by row. Collective over the ranks that hold the
    student together, which all get the same batch and the same answer.
    """
    ids_BT = batch.inputs["input_ids"]
    labels_BT = batch.tokens.labels_BT.to(ids_BT.device)
    found_2BT = torch.zeros(2, *labels_BT.shape, dtype=torch.float64, device=ids_BT.device)
    logits_BSV = _through_stages(chunks, ids_BT, batch.inputs.get("pixel_values"))
    if logits_BSV is not None:
        _judge(logits_BSV, labels_BT, found_2BT)
        if mpu.get_context_parallel_world_size() > 1:
            dist.all_reduce(found_2BT, group=mpu.get_context_parallel_group())
    stages = mpu.get_pipeline_model_parallel_group()
    if stages.size() > 1:
        dist.broadcast(found_2BT, group_src=stages.size() - 1, group=stages)
    right_N, loss_N = found_2BT[:, labels_BT >= 0].cpu()
    return right_N > 0, loss_N


def _through_stages(chunks: Sequence[nn.Module], ids_BT: Tensor, pixels: Any) -> Tensor | None:
    """Return the last stage's logits [B, S, V / tensor ranks] there, and None elsewhere."""
    stages = mpu.get_pipeline_model_parallel_group()
    place, num_stages, output = stages.rank(), stages.size(), None
    for chunk, student in zip(chunks, student_chunks(chunks), strict=True):
        if not student.pre_process and num_stages > 1:
            hidden = receive_tensor((place - 1) % num_stages, stages, ids_BT.device)
            student.set_input_tensor([hidden])
        output = chunk(ids_BT, pixel_values=pixels)
        if not student.post_process and num_stages > 1:
            send_tensor(output, (place + 1) % num_stages, stages)
    return output if student_chunks(chunks)[-1].post_process else None


def _judge(logits_BSV: Tensor, labels_BT: Tensor, found_2BT: Tensor) -> None:
    """Write whether the argmax is right, and the loss, where this context rank has labels."""
    labels_BS, places_T = context_part(labels_BT, 1), torch.arange(labels_BT.shape[1])
    places_S = context_part(places_T.to(labels_BT.device), 0)
    row_N, column_N = (labels_BS >= 0).nonzero(as_tuple=True)
    logits_NV = gather_from_tensor_model_parallel_region(logits_BSV[row_N, column_N]).float()
    labels_N = labels_BS[row_N, column_N]
    loss_N = nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    found_2BT[0, row_N, places_S[column_N]] = (logits_NV.argmax(dim=-1) == labels_N).double()
    found_2BT[1, row_N, places_S[column_N]] = loss_N.double()
