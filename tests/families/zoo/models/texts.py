"""Special settings of causal language models; what is not named here is shrunk by name alone."""

from __future__ import annotations

from typing import Any

_HEADS_ALIKE: dict[str, Any] = {"num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 100.0}
_QUERY_SCALE = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8}
_GEMMA4 = {"final_logit_softcapping": 2.0, "use_bidirectional_attention": "vision"}
_EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2}

TEXTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 16},
    "codegen": {"rotary_dim": 8},
    "cohere": {"logit_scale": 0.4},
    "cohere2": {"logit_scale": 0.4},
    "cohere2_moe": {"logit_scale": 0.4},
    "cohere_compass_text": {
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}
    },
    "deepseek_v2": {**_EXPERTS, "first_k_dense_replace": 1},
    "dots1": {**_EXPERTS, "n_shared_experts": 1},
    "dots3_note_text": _HEADS_ALIKE,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    "granite_swa": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0, "residual_multiplier": 0.7},
    "granitemoe_swa": {"logits_scaling": 3.0},
    "granitemoehybrid": {"logits_scaling": 3.0},
    "granitemoeshared": {"logits_scaling": 3.0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hyperclovax": {"logits_scaling": 0.4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"floor_scale": 64, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1, 0]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "minicpm3": {"dim_model_base": 24, "scale_emb": 2, "scale_depth": 1.0},
    "ministral": {"head_dim": 16},
    "ministral3": {"rope_parameters": {**_ROPE, **_QUERY_SCALE}},
    "mistral": {"head_dim": 16},
    "mistral4": {"head_dim": 16},
    "nanochat": {"final_logit_softcapping": 2.0},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "vaultgemma": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields of the tiny config, by ``model_type``: scales and caps that are not neutral."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text, no cap": ("gemma3_text", {"final_logit_softcapping": None}),
    "gemma4_text, shared keys": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "llama4_text, near floor": ("llama4_text", {"floor_scale": 8}),
    "minimax, window": ("minimax", {"sliding_window": 8}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, window": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
"""Further models of a ``model_type``, with other fields."""
