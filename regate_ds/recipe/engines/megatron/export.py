"""Put the trained student together on the first rank, in its Hugging Face form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from regate_ds.families.table import family_of
from regate_ds.recipe.engines.megatron.chunks import StudentChunk
from regate_ds.recipe.engines.megatron.experts import join_experts
from regate_ds.recipe.engines.megatron.lora import adapter_names
from regate_ds.recipe.engines.megatron.names import WeightMap
from regate_ds.recipe.engines.megatron.weights import gather_parts, gather_to_first
from regate_ds.recipe.students.config import LoraConfig
from regate_ds.recipe.students.student import Student
from regate_ds.teacher.backbone import text_backbone


def student_weights(
    student: Student,
    chunks: Sequence[StudentChunk],
    lora: LoraConfig | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return all weights on the job's first rank, in CPU memory, and nothing elsewhere.

    Adapters stand beside them, as `...q_proj.lora_A.weight`. Collective over the job.
    """
    config = text_backbone(student.model).config
    text = join_experts(gather_to_first([chunk.gpt for chunk in chunks], config, device))
    if lora is not None:
        held = [chunk.adapters for chunk in chunks if chunk.adapters is not None]
        own = {name: weight for one in held for name, weight in one.weights().items()}
        parts = [WeightMap(name, (name,)) for name in adapter_names(config, lora)]
        text |= gather_parts(own, parts, device)
    decoder = family_of(student.model).decoder
    found: dict[str, Tensor] = {}
    for name, weight in text.items():
        inside = name.removeprefix("model.")
        found[name if inside == name else f"model.{decoder}.{inside}"] = weight
    for chunk in chunks:
        if chunk.vision is not None:
            for name, parameter in chunk.vision.named_parameters():
                found[f"model.{name}"] = parameter.detach().cpu()
    return found if dist.get_rank() == 0 else {}
