"""Tiny models of Megatron-Bridge, by its own providers, and their batches with images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import IGNORE
from tests.adapters.megatron.build_helper import (
    MROPE_SECTION,
    TOWERS,
    fill,
    host_values,
    wrapped,
)
from tests.adapters.megatron.cases_helper import HIDDEN, VOCABULARY, Case, Item
from tests.support.batches import random_batch

IMAGE_ID, VIDEO_ID, START_ID = 61, 62, 63
GRID = (1, 4, 4)
NUM_TOKENS = 4
"""Of an image: 16 patches, merged by four."""

PATCH_VALUES = 3 * 2 * 2
TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "out_hidden_size": HIDDEN,
}


@dataclass(frozen=True)
class GridItem(Item):
    """A batch as Bridge's forward step gives it to a Qwen-VL model."""

    inputs: dict[str, Tensor]


def grid_item(case: Case, lengths: list[list[int]], seed: int, *, has_images: bool) -> GridItem:
    """Row r has one image, and one more if r is odd; without images all is text."""
    ids_BT, tokens = random_batch(lengths, seed=seed, length=case.length)
    labels_BT, image_BT = tokens.labels_BT.clone(), torch.full_like(tokens.labels_BT, -1)
    num_images = 0
    for row in range(len(lengths) if has_images else 0):
        for number in range(1 + row % 2):
            start = 1 + number * (NUM_TOKENS + 1)
            end = start + 1 + NUM_TOKENS
            ids_BT[row, start] = START_ID
            ids_BT[row, start + 1 : end] = IMAGE_ID
            image_BT[row, start + 1 : end] = number
            labels_BT[row, :end] = IGNORE
            num_images += 1
    inputs = {"input_ids": ids_BT}
    if num_images:
        generator = torch.Generator().manual_seed(seed)
        num_patches = GRID[0] * GRID[1] * GRID[2] * num_images
        inputs["pixel_values"] = torch.randn(num_patches, PATCH_VALUES, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([GRID] * num_images)
    return GridItem(ids_BT, replace(tokens, labels_BT=labels_BT, image_BT=image_BT), inputs)


def provider(case: Case) -> Any:
    """The provider of the case's model, finalized."""
    from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider
    from megatron.bridge.models.qwen_vl.qwen25_vl_provider import Qwen25VLModelProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

    values = {
        **host_values(case),
        "vocab_size": VOCABULARY,
        "seq_length": case.length,
        "cross_entropy_loss_fusion": False,
        "share_embeddings_and_output_weights": False,
        "mrope_section": list(MROPE_SECTION),
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": START_ID,
        "bf16": False,
    }
    if case.model == "qwen25_vl":
        tower: Any = Qwen2_5_VLVisionConfig(**TOWER, window_size=8, fullatt_block_indexes=[1])
        made: Any = Qwen25VLModelProvider(**values, add_qkv_bias=True, vision_config=tower)
    else:
        deep = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        tower = Qwen3VLVisionConfig(**TOWER, **deep)
        made = Qwen3VLModelProvider(**values, vision_config=tower)
    made._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    made.finalize()
    return made


def bare(case: Case) -> Any:
    """This rank's part of the model, with the weights of ``full_weight``."""
    from megatron.core import parallel_state as mpu

    from regate_ds.adapters.megatron_on_cpu.bridge import install_for_bridge

    install_for_bridge()
    model = provider(case).provide(
        pre_process=mpu.is_pipeline_first_stage(), post_process=mpu.is_pipeline_last_stage()
    )
    for name, parameter in model.named_parameters():
        if name.startswith(TOWERS):
            parameter.ungated = True
    fill(model)
    return model


def bridged(case: Case) -> nn.Module:
    """The same, in Megatron's DDP."""
    model = bare(case)
    model.model_type = None
    return wrapped(case, model.config, model)
