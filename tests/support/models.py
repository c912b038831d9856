"""Small random students for tests, and batches for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from tests.support.batches import VOCABULARY, random_batch

IMAGE_TOKEN = 60
__all__ = ["VOCABULARY", "random_batch"]
_CAUSAL = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def text_config(
    kind: str = "llama", *, num_layers: int = 3, heads: tuple[int, int] = (4, 2), **extra
):
    config_class, _ = _CAUSAL[kind]
    if kind == "mistral":
        extra = {"sliding_window": None, **extra}
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return config_class(**{**fields, **extra})


def causal_lm(kind: str = "llama", attention: str = "sdpa", **sizes) -> nn.Module:
    torch.manual_seed(0)
    config = text_config(kind, **sizes)
    config._attn_implementation = attention
    model = _CAUSAL[kind][1](config)
    return _enlarge(model).train()


def llava(attention: str = "sdpa", **sizes) -> nn.Module:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(**sizes),
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config)
    # Not the tower: large weights there would make its own gradients ill-conditioned in fp32.
    _enlarge(model.model.language_model)
    return model.train()


def qwen2_vl(attention: str = "sdpa", *, num_layers: int = 3) -> nn.Module:
    """Rotary positions with three axes; an image of h x w merged patches is h * w tokens."""
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "hidden_size": 32}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    model = Qwen2VLForConditionalGeneration(config)
    _enlarge(model.model.language_model)
    return model.train()


def _enlarge(model: nn.Module) -> nn.Module:
    """Weights large enough that what a token attends to shows in the result."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def with_images(
    input_ids_BT: Tensor, batch: TokenBatch, images: Sequence[Sequence[int]]
) -> TokenBatch:
    """Write images of so many placeholders one after the other from position 1 of each row.

    Changes ``input_ids_BT``; returns the batch without targets that are placeholders.
    """
    image_BT = torch.full_like(input_ids_BT, -1)
    for r, sizes in enumerate(images):
        numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
        image_BT[r, 1 : 1 + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
    input_ids_BT[image_BT >= 0] = IMAGE_TOKEN
    is_target_BT = input_ids_BT.roll(-1, 1) == IMAGE_TOKEN
    labels_BT = batch.labels_BT.masked_fill(is_target_BT, IGNORE)
    return replace(batch, labels_BT=labels_BT, image_BT=image_BT)


def packed_positions(batch: TokenBatch) -> Tensor:
    """Positions that restart in each sample, and in the padding."""
    positions = torch.zeros_like(batch.segment_BT)
    for r, row in enumerate(batch.segment_BT.tolist()):
        for t in range(1, len(row)):
            positions[r, t] = positions[r, t - 1] + 1 if row[t] == row[t - 1] else 0
    return positions
