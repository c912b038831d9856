"""Shrink a config of transformers: each field whose name is known gets a tiny value."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, HIDDEN, VOCABULARY, WINDOW = 4, 64, 99, 8

TEXT: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "num_sliding_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(
        ("decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dense_intermediate_size"), 96
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    "num_experts_per_token": 2,
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "zero_expert_num": 2,
    "original_max_position_embeddings": WINDOW,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
    "lru_width": HIDDEN,
    "max_window_layers": 2,
    "num_nextn_predict_layers": 0,
    "router_hidden_size": 16,
}
"""Values of a decoder's fields, by name; only fields that the config has are set."""

VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size"), HIDDEN),
    "head_dim": 16,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
"""The same for a vision tower."""

PADDING, START, END, IMAGE_TOKEN, VIDEO_TOKEN, BEFORE, AFTER = 0, 1, 2, 90, 91, 92, 93

TOKENS: dict[str, int] = {
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE_TOKEN),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO_TOKEN),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "boi_token_id"), BEFORE),
    **dict.fromkeys(("boi_token_index", "image_begin_token_id"), BEFORE),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_id"), AFTER),
    "eoi_token_index": AFTER,
    "pad_token_id": PADDING,
    "bos_token_id": START,
    "eos_token_id": END,
}
"""Ids of special tokens; any other id gets one of those that no text has."""

OTHER_TOKEN = 95


def shrink(model_type: str, *, sizes: dict[str, Any] = TEXT, **special: Any) -> dict[str, Any]:
    """Return the fields of a tiny config of this type, in which ``special`` has the last word."""
    return {"model_type": model_type, **_shrunk(CONFIG_MAPPING[model_type](), sizes), **special}


def tiny_config(model_type: str, **special: Any) -> PreTrainedConfig:
    """Return the tiny config itself. A dict in ``special`` is of an inner config."""
    fields = shrink(model_type, **special)
    fields.pop("model_type")
    return CONFIG_MAPPING[model_type](**fields)


def _shrunk(default: PreTrainedConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    depth = next((n for n in vars(default) if n in sizes and sizes[n] == LAYERS), None)
    num_layers = getattr(default, depth) if depth else None
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            inner = TEXT if "text" in name or "decoder" in name else VISION
            fields[name] = {"model_type": value.model_type, **_shrunk(value, inner)}
        elif name.endswith(("_token_id", "_token_index")):
            fields[name] = TOKENS.get(name, None if value is None else OTHER_TOKEN)
        elif _is_dropout(name, value):
            fields[name] = 0.0
        elif name in sizes and value is not None:
            fields[name] = sizes[name]
        elif name == "rope_parameters" and "mrope_section" in (value or {}):
            fields[name] = _three_axes(value, default, sizes)
        elif _is_kind_of_layers(value, num_layers):
            fields[name] = _mixed(value)
    if "qk_rope_head_dim" in fields:  # low-rank keys are of all heads, and rotate only in part
        fields["num_key_value_heads"] = sizes["num_attention_heads"]
        fields["head_dim"] = fields["qk_rope_head_dim"]
    return fields


def _three_axes(rope: dict[str, Any], default: PreTrainedConfig, sizes: Any) -> dict[str, Any]:
    """Return rotary settings whose three sections fill what is left of a head."""
    size = getattr(default, "qk_rope_head_dim", None) and sizes["qk_rope_head_dim"]
    half = int((size or sizes["head_dim"]) * rope.get("partial_rotary_factor", 1.0)) // 2
    return {
        **rope,
        "rope_theta": 100.0,
        "mrope_section": [half - 2 * (half // 3), *2 * [half // 3]],
    }


def _is_dropout(name: str, value: Any) -> bool:
    random = ("drop" in name and "token" not in name) or "jitter" in name
    return random and isinstance(value, float)


def _is_kind_of_layers(value: Any, num_layers: int | None) -> bool:
    return isinstance(value, list | tuple) and len(value) == num_layers and bool(value)


def _mixed(kinds: list[Any]) -> list[Any]:
    """Return the kinds of the tiny model's layers: each that the family has, in turn."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[i % len(distinct)] for i in range(LAYERS)]
