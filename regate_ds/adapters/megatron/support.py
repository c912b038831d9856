"""What a Megatron-core model must be for elision to compute it rightly; all else is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import nn

from regate_ds.config import RegateConfig

_UNEVEN = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
"""What gives stages different numbers of layers."""


def require_supported_chunks(
    chunks: Sequence[nn.Module], config: RegateConfig, *, ragged: bool, ends_early: bool
) -> None:
    """Refuse by name what elision would compute wrongly. The first problem is told."""
    host: Any = chunks[0].config
    for is_problem, what in [
        *_model_problems(chunks, host),
        *_attention_problems(chunks, ragged=ragged),
        *_layout_problems(host, ragged=ragged, ends_early=ends_early),
        *_range_problems(chunks, config, host),
    ]:
        if is_problem:
            raise ValueError(what)


def _model_problems(chunks: Sequence[nn.Module], host: Any) -> list[tuple[bool, str]]:
    kinds = {gpt.position_embedding_type for gpt in chunks}
    return [
        (
            not host.calculate_per_token_loss,
            "calculate_per_token_loss=False divides by micro-batch, which uneven counts make "
            "wrong; set calculate_per_token_loss=True",
        ),
        (
            getattr(host, "mtp_num_layers", None) is not None,
            f"mtp_num_layers={getattr(host, 'mtp_num_layers', None)}: multi-token prediction needs "
            "the neighbours of each position; leave it None",
        ),
        (
            host.multi_latent_attention,
            "multi_latent_attention=True is not supported: it rotates by positions of its own",
        ),
        (
            not kinds <= {"rope", "none"},
            f"position_embedding_type={sorted(kinds)}: only 'rope' and 'none' are supported",
        ),
        (
            host.apply_rope_fusion,
            "apply_rope_fusion=True cannot rotate by arbitrary positions; set it False",
        ),
        (
            getattr(host, "window_size", None) is not None,
            f"window_size={getattr(host, 'window_size', None)}: after elision a window would count "
            "kept tokens, not positions; leave it None",
        ),
        (
            getattr(host, "linear_attention_freq", None) is not None
            or getattr(host, "is_hybrid_model", False),
            "linear or hybrid attention layers are not supported, only full causal attention",
        ),
        (
            getattr(host, "heterogeneous_block_specs", False),
            "heterogeneous_block_specs=True is not supported: layers may lack attention",
        ),
        (
            host.fp8 is not None
            and (host.fp8_dot_product_attention or host.fp8_multi_head_attention),
            "fp8_dot_product_attention and fp8_multi_head_attention are not tested; set both False "
            "(fp8 in the linear layers may stay)",
        ),
    ]


def _attention_problems(chunks: Sequence[Any], *, ragged: bool) -> list[tuple[bool, str]]:
    layers = [layer.self_attention for gpt in chunks for layer in gpt.decoder.layers]
    masks = {mask.name for layer in layers if (mask := getattr(layer, "attn_mask_type", None))}
    # Bounds of packed rows say where padding is; a mask of the full rows is of no use to kept ones.
    known = {"causal", "padding_causal"} if ragged else {"causal"}
    stock = any(type(getattr(x, "core_attention", None)) is DotProductAttention for x in layers)
    return [
        (
            not masks <= known,
            f"attn_mask_type={sorted(masks)}: kept rows have no mask but causal order; build the "
            "layers with AttnMaskType.causal",
        ),
        (
            ragged and stock,
            "row_format='ragged' needs an attention that takes packed rows (thd), not "
            "DotProductAttention; build the layers with Transformer Engine's spec, or use "
            "row_format='padded'",
        ),
    ]


def _layout_problems(host: Any, *, ragged: bool, ends_early: bool) -> list[tuple[bool, str]]:
    virtual = (mpu.get_virtual_pipeline_model_parallel_world_size() or 1) > 1
    graphs = getattr(host, "cuda_graph_impl", "none") or "none"
    return [
        (
            getattr(host, "overlap_moe_expert_parallel_comm", False),
            "overlap_moe_expert_parallel_comm=True goes around a layer's hooks; set it False",
        ),
        (
            getattr(host, "hybrid_context_parallel", False),
            "hybrid_context_parallel=True is not supported: it cuts each sample differently",
        ),
        (
            getattr(host, "fine_grained_activation_offloading", False) or host.cpu_offloading,
            "activation offloading is not supported; set cpu_offloading and "
            "fine_grained_activation_offloading to False",
        ),
        (
            graphs != "none" or getattr(host, "enable_cuda_graph", False),
            f"cuda_graph_impl={graphs!r}: the number of kept tokens changes from step to step; set "
            "it to 'none'",
        ),
        (
            host.tp_comm_overlap,
            "tp_comm_overlap=True needs one sequence length for the whole run; set it False",
        ),
        (
            host.variable_seq_lengths,
            "variable_seq_lengths=True is not needed: every rank reads shapes off the plan; set it "
            "False",
        ),
        (
            getattr(host, "distribute_saved_activations", False),
            "distribute_saved_activations=True is not supported; set it False",
        ),
        (
            host.num_moe_experts is not None and host.moe_expert_capacity_factor is not None,
            "moe_expert_capacity_factor counts padding as tokens; leave it None",
        ),
        (
            host.num_moe_experts is not None
            # "allgather" takes equally many tokens on all ranks for granted.
            and host.moe_token_dispatcher_type != "alltoall",
            f"moe_token_dispatcher_type={host.moe_token_dispatcher_type!r} is not tested with "
            "uneven counts; use 'alltoall'",
        ),
        (
            ends_early and virtual,
            "last_layer before the depth is not supported with virtual pipeline parallelism; set "
            "last_layer to null, or train without interleaving",
        ),
    ]


def _range_problems(
    chunks: Sequence[nn.Module], config: RegateConfig, host: Any
) -> list[tuple[bool, str]]:
    depth, first = host.num_layers, config.first_layer
    last = depth if config.last_layer is None else config.last_layer
    virtual = (mpu.get_virtual_pipeline_model_parallel_world_size() or 1) > 1
    # The same answer on every rank, so that all refuse.
    per_chunk = depth // (
        mpu.get_pipeline_model_parallel_world_size()
        * (mpu.get_virtual_pipeline_model_parallel_world_size() or 1)
    )
    return [
        (
            not 0 <= first < last <= depth,
            f"gated layers [{first}, {last}) do not fit a decoder of {depth} layers; set "
            "first_layer and last_layer within it",
        ),
        (
            any(len(gpt.decoder.layers) == 0 for gpt in chunks),
            "a pipeline stage without layers is not supported; give each stage at least one",
        ),
        (
            virtual and any(getattr(host, name, None) not in (None, False) for name in _UNEVEN),
            f"interleaving with {', '.join(_UNEVEN)} is not supported: leave them unset",
        ),
        (
            virtual and first > per_chunk,
            f"first_layer={first} lies behind the first virtual chunk ({per_chunk} layers): with "
            "interleaving the gather must be in it; lower first_layer",
        ),
    ]
