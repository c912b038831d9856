"""Multimodal families that few train: with images where these are simple, else with text alone."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.zoo.models.grids import MARKED, THREE
from tests.families.zoo.models.multimodal import family, tower
from tests.families.zoo.models.pixels import (
    Images,
    grids,
    mark_images,
    mark_images_by_token_type,
    patches_with_places,
    sized,
    squares,
    strips,
)


def pooled_crops(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make one crop of each image, as Molmo 2 takes it: each token is of two patches."""
    pixels = torch.randn(count, 4, 3 * 8**2, generator=generator)
    pooled_n2 = torch.arange(4 * count).view(-1, 2)
    grids_I4 = torch.tensor([[1, 1, 1, 1]] * count)
    return {"pixel_values": pixels, "image_token_pooling": pooled_n2, "image_grids": grids_I4}


GEMMA = {"extra_inputs": mark_images_by_token_type}
MARKS = {"extra_inputs": mark_images}
PLACES = tower(
    "gemma4_unified_vision",
    patch_size=4,
    pooling_kernel_size=1,
    mm_embed_dim=32,
    output_proj_dims=32,
)
MOLMO = {
    "vision": {"image_size": [16, 16], "num_position_embeddings": None},
    "text": {"additional_vocab_size": 8},
    "adapter_config": tower("molmo2_adapter", vision_feature_layer=[0, 1], text_hidden_size=64),
}

OTHERS = (
    family("molmo2", "Molmo2", pooled_crops, MARKS, image_patch_id=90, **MOLMO),
    family("gemma4_unified", "Gemma4Unified", patches_with_places, MARKS, vision_config=PLACES),
    family("mistral_large4", "MistralLarge4", sized),
    family("minicpm_ocr", "MiniCPMOcr", strips),
    family("shieldgemma2", "Gemma3", squares, GEMMA, mm_tokens_per_image=4),
    family("pp_chart2table", "GotOcr2", squares),
    family("glmga", "Glm46V", grids, MARKED, text=THREE, vision={"patch_size": 4}),
    family("deepseek_vl_hybrid", "DeepseekVLHybrid"),
    family("mistral4", "Mistral4ForCausalLM", head_dim=16),
    family("fuyu", "FuyuForCausalLM"),
    family("git", "GitForCausalLM"),
    family("evolla", "EvollaForProteinText2Text"),
    family("hy_v4_vl", "HYV4VL"),
    family("inkling2", "Inkling2"),
    family("inkling2_loop", "Inkling2Loop"),
    family("mllama", "Mllama"),
    family("mllama_text_model", "MllamaForCausalLM"),
    family("unlimited_ocr", "UnlimitedOcr", text={"num_key_value_heads": 4}),
    family("step3p7", "Step3p7", text={"sliding_window": 8}),
)
"""The families from deepseek_vl_hybrid on run text rows only."""
