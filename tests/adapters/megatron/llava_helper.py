"""A small LLaVAModel, its batches, and its vision side for the plain reference."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from regate_ds.adapters.megatron_on_cpu.modules import Norm, layer_spec
from regate_ds.algorithm.batch import IGNORE
from tests.adapters.megatron.cases_helper import VOCABULARY, Case, Item
from tests.support.batches import random_batch

IMAGE, PATCH = 8, 4
NUM_PATCHES = (IMAGE // PATCH) ** 2
IMAGE_AT = 1
"""Position of the first image in every row; another one touches it."""


@dataclass(frozen=True)
class ImageItem(Item):
    """``ids_BT`` are of the text, with a placeholder an image; ``tokens`` of what the decoder sees.

    The images [I, ...] are row by row, equally many in each.
    """

    images: Tensor


def image_item(case: Case, lengths: list[list[int]], seed: int) -> ImageItem:
    ids_BT, tokens = random_batch(lengths, seed=seed, length=case.length)
    num_images = 2 if case.image_share < 1.0 else 1
    start, end = IMAGE_AT + num_images, IMAGE_AT + num_images * NUM_PATCHES
    text_BT = torch.cat([ids_BT[:, :start], ids_BT[:, end:]], dim=1)
    text_BT[:, IMAGE_AT:start] = DEFAULT_IMAGE_TOKEN_INDEX
    labels_BT = tokens.labels_BT.clone()
    labels_BT[:, IMAGE_AT - 1 : end - 1] = IGNORE
    image_BT = torch.full_like(labels_BT, -1)
    image_BT[:, IMAGE_AT:end] = torch.arange(num_images).repeat_interleave(NUM_PATCHES)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images * len(lengths), 3, IMAGE, IMAGE, generator=generator)
    return ImageItem(text_BT, replace(tokens, labels_BT=labels_BT, image_BT=image_BT), images)


def vision_config(host: TransformerConfig, **more: Any) -> TransformerConfig:
    config = copy.copy(host)
    values = {
        "num_layers": 2,
        "pipeline_model_parallel_size": 1,
        "sequence_parallel": False,
        "recompute_granularity": None,
        "normalization": "LayerNorm",
        **more,
    }
    for name, value in values.items():
        setattr(config, name, value)
    config.vision_model_type = "internvit"
    return config


def vision_spec() -> Any:
    spec = get_vit_layer_with_local_spec()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    return spec


def projector_spec() -> Any:
    mlp = get_gpt_layer_local_spec().submodules.mlp
    # A ModuleSpec in 0.16.1, a partial of the module in 0.19.2.
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]


def llava(case: Case, config: TransformerConfig) -> LLaVAModel:
    first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec = layer_spec(spec, own_attention=case.own_attention)
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    block = TransformerBlockSubmodules([spec] * (case.num_layers // case.pp), Norm)
    # Its constructor looks for the attention where a single layer's spec has it.
    block.submodules = spec.submodules
    return LLaVAModel(
        config,
        block,
        VOCABULARY,
        case.length,
        vision_config(config),
        vision_spec(),
        True,
        vision_config(config),
        projector_spec(),
        language_position_embedding_type="rope",
        pre_process=first,
        post_process=last,
        add_encoder=first,
        img_h=IMAGE,
        img_w=IMAGE,
        patch_dim=PATCH,
    )


class PlainVision(nn.Module):
    """Tower and projector alone, in double precision: elision does not touch them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.vision_model = CLIPViTModel(
            vision_config(config),
            vision_spec(),
            img_h=IMAGE,
            img_w=IMAGE,
            patch_dim=PATCH,
            model_subtype="internvit",
        )
        self.vision_projection = MultimodalProjector(
            vision_config(config), projector_spec(), "mlp", config.hidden_size
        )

    def forward(self, images: Tensor) -> Tensor:
        """[I, patches, H]"""
        features = self.vision_model(images)[:, 1:]
        return self.vision_projection(features.transpose(0, 1).contiguous()).transpose(0, 1)
