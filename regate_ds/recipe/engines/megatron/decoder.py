"""Build a Llama-shaped decoder as Megatron-core's GPTModel, for the groups that are set up."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.nn import functional as F

from regate_ds.families.text_decoders import TEXT_DECODERS
from regate_ds.recipe.config.megatron_limits import inner_size, num_experts, require_decoder
from regate_ds.recipe.engines.megatron.names import head_size
from regate_ds.recipe.engines.megatron.norm import RootMeanSquareNorm

try:
    import transformer_engine  # noqa: F401
except ImportError:
    HAS_ENGINE = False
else:
    HAS_ENGINE = True


def transformer_config(text: Any, **more: Any) -> TransformerConfig:
    """Return Megatron's settings for a Hugging Face decoder config.

    ValueError names what Megatron-core would compute differently.
    """
    require_decoder(text)
    settings = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": head_size(text),
        "ffn_hidden_size": inner_size(text),
        "layernorm_epsilon": text.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": TEXT_DECODERS[text.model_type].has_qkv_bias,
        "qk_layernorm": TEXT_DECODERS[text.model_type].has_qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": text.attention_dropout,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "calculate_per_token_loss": True,
        # The student's weights are loaded afterwards, so the initial ones do not matter.
        "use_cpu_initialization": not torch.cuda.is_available(),
        "tensor_model_parallel_size": mpu.get_tensor_model_parallel_world_size(),
        "context_parallel_size": mpu.get_context_parallel_world_size(),
        "pipeline_model_parallel_size": mpu.get_pipeline_model_parallel_world_size(),
    }
    return TransformerConfig(**{**settings, **_expert_settings(text), **more})


def _expert_settings(text: Any) -> dict[str, Any]:
    """Return what a decoder with experts needs: each token meets its best ones, as many as fit.

    Megatron weighs them by a softmax over the best, which is Hugging Face's over all, rescaled; or
    by that over all, where the decoder does not rescale it.
    """
    if not num_experts(text):
        return {}
    return {
        "num_moe_experts": num_experts(text),
        "moe_router_topk": text.num_experts_per_tok,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_ffn_hidden_size": inner_size(text),
        "moe_router_pre_softmax": not getattr(text, "norm_topk_prob", True),
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": mpu.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": mpu.get_expert_tensor_parallel_world_size(),
    }


def gpt_chunk(text: Any, config: TransformerConfig, vp_stage: int | None = None) -> GPTModel:
    """Build this rank's part of the decoder, with embedding and output layer where they belong."""
    return GPTModel(
        config,
        _engine_layers(config) if HAS_ENGINE else _plain_layers(config),
        text.vocab_size,
        text.max_position_embeddings,
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        position_embedding_type="rope",
        rotary_base=text.rope_parameters["rope_theta"],
        share_embeddings_and_output_weights=text.tie_word_embeddings,
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
    )


def _engine_layers(config: TransformerConfig) -> Any:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )


def _plain_layers(config: TransformerConfig) -> Any:
    """Return the specs of this rank's layers, made of torch's own operations."""
    layer: Any = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RootMeanSquareNorm
    if config.qk_layernorm:
        heads = parts.self_attention.submodules
        heads.q_layernorm = heads.k_layernorm = RootMeanSquareNorm
    num_parts = config.pipeline_model_parallel_size * (
        config.virtual_pipeline_model_parallel_size or 1
    )
    return TransformerBlockSubmodules(
        [layer] * (config.num_layers // num_parts), RootMeanSquareNorm
    )
