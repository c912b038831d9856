"""Put the trained student together from all ranks, in its Hugging Face form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from regate_ds.families.table import family_of
from regate_ds.recipe.engines.megatron.chunks import StudentChunk
from regate_ds.recipe.engines.megatron.weights import from_megatron, gather_full
from regate_ds.recipe.students.student import Student
from regate_ds.teacher.backbone import text_backbone


def fill_student(student: Student, chunks: Sequence[StudentChunk]) -> None:
    """Copy all trained weights into the student, in CPU memory.

    Collective over the ranks that hold the model together.
    """
    model: Any = student.model
    model.to("cpu")
    backbone = text_backbone(model)
    decoder = from_megatron(gather_full([chunk.gpt for chunk in chunks]), backbone.config)
    vision = _gather_vision(chunks)
    with torch.no_grad():
        # The backbone is a view: its weights are the student's own storage.
        for name, parameter in backbone.named_parameters():
            parameter.copy_(decoder[name])
        for name, parameter in model.model.named_parameters():
            if not name.startswith(f"{family_of(model).decoder}."):
                parameter.copy_(vision[name])


def _gather_vision(chunks: Sequence[StudentChunk]) -> dict[str, Tensor]:
    """Return the weights of tower and projector, from the first stage."""
    own_weights = {
        name: parameter.detach().cpu()
        for chunk in chunks
        if chunk.vision is not None
        for name, parameter in chunk.vision.named_parameters()
    }
    stages: list[Any] = [None] * mpu.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, own_weights, group=mpu.get_pipeline_model_parallel_group())
    return stages[0]
