"""Tiny models with processors of their own, saved by their own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from regate_ds.families.table import FAMILIES
from tests.families.zoo.models.multimodal import tiny_multimodal
from tests.support.processors import MAKERS, PINPOINTS, processor

_LAST = {"vision_feature_layer": -1}
_TILES = {"image_grid_pinpoints": PINPOINTS}
_GRID: dict[str, Any] = {"patch_size": 4, "spatial_merge_size": 2}
_THREE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
}
_WINDOWED = {"window_size": 16, "fullatt_block_indexes": [1]}
_DEEP = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}

FIELDS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text": _THREE, "vision": {**_GRID, "hidden_size": 64}},
    "qwen2_5_vl": {"text": _THREE, "vision": {**_GRID, **_WINDOWED}},
    "qwen3_vl": {"text": _THREE, "vision": {**_GRID, **_DEEP}},
    "llava": {"decoder": "llama", **_LAST},
    "llava_next": {"decoder": "mistral", "text": {"sliding_window": None}, **_TILES, **_LAST},
    "llava_next_video": {
        "decoder": "mistral",
        "text": {"sliding_window": None},
        **_TILES,
        **_LAST,
    },
    "llava_onevision": _TILES,
    "internvl": {"decoder": "qwen2", "vision": {"image_size": [32, 32]}},
    "gemma3": {"mm_tokens_per_image": 4},
    "mistral3": {"decoder": "mistral", "text": {"sliding_window": None}},
    "idefics3": {"scale_factor": 2, "vision": {"image_size": 32}},
    "smolvlm": {"scale_factor": 2, "vision": {"image_size": 32}},
    "aya_vision": {"vision": {"image_size": 32}},
}
"""By ``model_type``: what its tiny config has beyond the usual."""


def make_model(name: str, seed: int = 0) -> Any:
    """Return a tiny model whose tokens are those of the processor of that name."""
    own, patch = processor(name), MAKERS[name][2]
    tokens = own.tokenizer
    config = tiny_multimodal(name, **FIELDS[name])
    config.image_token_id = tokens.convert_tokens_to_ids(patch)
    for each in (config, config.get_text_config(decoder=True)):
        each.vocab_size = len(tokens)
        each.bos_token_id, each.eos_token_id = tokens.bos_token_id, tokens.eos_token_id
        each.pad_token_id = tokens.pad_token_id
        each.max_position_embeddings = 4096
    for field, text in {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "video_token_id": getattr(own, "video_token", ""),
    }.items():
        if hasattr(config, field) and text in tokens.get_vocab():
            setattr(config, field, tokens.convert_tokens_to_ids(text))
    torch.manual_seed(seed)
    return getattr(transformers, FAMILIES[name].model_class)(config)


def save(name: str, folder: Path) -> None:
    """Write model and processor as their own classes do."""
    make_model(name).save_pretrained(folder)
    processor(name).save_pretrained(folder)
