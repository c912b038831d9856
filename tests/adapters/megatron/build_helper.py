"""Megatron-core models with weights that are the same in every layout."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn

from regate_ds.adapters.megatron_on_cpu.modules import Norm, WholeLinear, layer_spec
from tests.adapters.megatron.around_helper import Around
from tests.adapters.megatron.cases_helper import (
    BRIDGED,
    EXPERTS,
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    LATENT,
    VOCABULARY,
    Case,
)
from tests.adapters.megatron.llava_helper import llava

TOWERS = ("vision", "visual")
"""How the names of a vision tower's parameters begin."""

MROPE_SECTION = (2, 1, 1)
"""Pairs of values of a head that time, height and width turn."""

YARN: dict[str, Any] = {
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 16,
    "yarn_beta_fast": 2.0,
    "yarn_beta_slow": 0.25,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}


def join(case: Case) -> None:
    """Megatron's groups for the case; WORLD exists already."""
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp if case.vpp > 1 else None,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=1 if case.ep > 1 else case.tp,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)


def _experts(case: Case) -> dict[str, Any]:
    if case.model != "moe":
        return {}
    return {
        "num_moe_experts": EXPERTS,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss" if case.aux else "none",
        "moe_aux_loss_coeff": case.aux,
        "expert_model_parallel_size": case.ep,
        "moe_ffn_hidden_size": FFN,
    }


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


def host_config(case: Case, **more: Any) -> TransformerConfig:
    values = {**host_values(case), **more}
    if case.model == "latent":
        yarn = {name.removeprefix("yarn_"): value for name, value in YARN.items()}
        del yarn["correction_range_round_to_int"]
        # Its queries are of all heads.
        values |= {**LATENT, **yarn, "rope_type": case.positions, "num_query_groups": HEADS}
        return MLATransformerConfig(**values, qk_layernorm=True)
    config = TransformerConfig(**values)
    # Megatron-LM puts these there, from its own arguments.
    vars(config).update(YARN if case.positions == "yarn" else {})
    return config


def host_values(case: Case) -> dict[str, Any]:
    return {
        "num_layers": case.num_layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "ffn_hidden_size": FFN,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vpp if case.vpp > 1 else None,
        "context_parallel_size": case.cp,
        "sequence_parallel": case.sp,
        "pipeline_dtype": torch.float32,
        "params_dtype": torch.float32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "batch_p2p_comm": False,
        "deallocate_pipeline_outputs": True,
        "use_cpu_initialization": True,
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": finalize_model_grads,
        **({"mrope_section": list(MROPE_SECTION)} if case.positions == "mrope" else {}),
        **_experts(case),
        **RECOMPUTE[case.recompute],
    }


def build(case: Case, **more: Any) -> list[nn.Module]:
    """This rank's chunks, wrapped, with the weights of ``full_weight``."""
    if case.model in BRIDGED:
        from tests.adapters.megatron_bridge.models_helper import bridged

        return [bridged(case)]
    chunks = []
    for number in range(case.vpp):
        config = host_config(case, **more)
        stage = number if case.vpp > 1 else None
        chunk: Any = llava(case, config) if case.model == "llava" else gpt(case, config, stage)
        chunk.model_type = None
        chunk = Around(chunk) if case.model == "around" else chunk
        fill(chunk)
        chunks.append(wrapped(case, config, chunk))
    return chunks


def gpt(case: Case, config: TransformerConfig, vp_stage: int | None) -> GPTModel:
    experts = EXPERTS if case.model == "moe" else None
    latent = {"multi_latent_attention": True, "qk_layernorm": True}
    spec = get_gpt_layer_local_spec(
        num_experts=experts, normalization="RMSNorm", **(latent if case.model == "latent" else {})
    )
    layer_spec(spec, own_attention=case.own_attention)
    if case.model == "latent":
        parts = spec.submodules.self_attention.submodules
        parts.q_layernorm = parts.kv_layernorm = Norm
        if case.tp > 1:
            parts.linear_q_down_proj = parts.linear_kv_down_proj = WholeLinear
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    num_here = case.num_layers // (case.pp * case.vpp)
    block = TransformerBlockSubmodules(layer_specs=[spec] * num_here, layer_norm=Norm)
    return GPTModel(
        config,
        block,
        VOCABULARY,
        64,
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        position_embedding_type="rope" if case.model == "latent" else case.positions,
        share_embeddings_and_output_weights=case.model == "tied",
        scatter_embedding_sequence_parallel=case.model != "around",
        vp_stage=vp_stage,
    )


def wrapped(case: Case, config: TransformerConfig, chunk: nn.Module) -> DistributedDataParallel:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=case.distributed_optimizer,
    )
    return DistributedDataParallel(config, ddp, chunk)


def named(chunk: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by names that do not depend on the layout."""
    found = {}
    for name, parameter in chunk.named_parameters():
        found[global_name(chunk, name.removeprefix("module."))] = parameter
    return found


def global_name(chunk: nn.Module, name: str) -> str:
    if name.startswith(TOWERS):
        return name
    name = name.removeprefix("language_model.")
    chunk = getattr(chunk, "language_model", chunk)
    parts = name.split(".")
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    if "layers" in parts and "decoder" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(chunk.decoder.layers[int(parts[at])].layer_number - 1)
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        rank = mpu.get_expert_model_parallel_rank()
        per_rank = EXPERTS // mpu.get_expert_model_parallel_world_size()
        parts[at] = str(int(parts[at]) + rank * per_rank)
    return ".".join(parts)


def full_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights large enough that what a token attends to shows in the result."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1.0 + 0.1 * values
    if name.startswith(TOWERS):
        # Large weights there would make its own gradients ill-conditioned in single precision.
        return values * (0.5 / shape[1] ** 0.5)
    return values * (1.5 / shape[1] ** 0.5 if "embedding" not in name else 1.0)


def full_shape(parameter: nn.Parameter, name: str) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= _tensor_size(name)
    return tuple(shape)


def shard(full: Tensor, parameter: nn.Parameter, name: str) -> Tensor:
    """This rank's part of a full weight or gradient."""
    size, rank = _tensor_size(name), mpu.get_tensor_model_parallel_rank()
    if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
        return full
    if "linear_fc1" in name and not hasattr(parameter, "ungated"):
        # Gate and value, each cut over the ranks.
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim=parameter.partition_dim)[rank]


def _tensor_size(name: str) -> int:
    if "local_experts" in name:
        return mpu.get_expert_tensor_parallel_world_size()
    return mpu.get_tensor_model_parallel_world_size()


def fill(chunk: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in named(chunk).items():
            full = full_weight(name, full_shape(parameter, name))
            parameter.copy_(shard(full, parameter, name))
