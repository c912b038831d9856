"""Refuse Megatron-core models that elision would compute wrongly; each error names the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import nn

from regate_ds.adapters.megatron.deepstack import num_additions
from regate_ds.adapters.megatron.local.latent import TABLES, latent_problems
from regate_ds.adapters.megatron.local.rotary import KINDS
from regate_ds.config import RegateConfig

_UNEVEN = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
"""Options that give stages different numbers of layers."""


def require_supported_chunks(
    chunks: Sequence[nn.Module], config: RegateConfig, *, ragged: bool, ends_early: bool
) -> None:
    """Refuse chunks that elision would compute wrongly: ValueError names the first problem."""
    host: Any = chunks[0].config
    for is_problem, what in [
        *_model_problems(chunks, host),
        *_attention_problems(chunks, ragged=ragged),
        *_layout_problems(host, last_layer=config.last_layer, ends_early=ends_early),
        *_range_problems(chunks, config, host),
    ]:
        if is_problem:
            raise ValueError(what)


def _model_problems(chunks: Sequence[nn.Module], host: Any) -> list[tuple[bool, str]]:
    kinds = {gpt.position_embedding_type for gpt in chunks}
    linear, hybrid = (getattr(host, n, None) for n in ("linear_attention_freq", "is_hybrid_model"))
    return [
        (
            not host.calculate_per_token_loss,
            "calculate_per_token_loss=False averages in each micro-batch, which is wrong for "
            "uneven counts; set calculate_per_token_loss=True",
        ),
        (
            (extra := getattr(host, "mtp_num_layers", None)) is not None,
            f"mtp_num_layers={extra} is not supported, as multi-token prediction needs the "
            "neighbours of each position; leave it None",
        ),
        *latent_problems(chunks, host),
        (
            (variant := getattr(host, "experimental_attention_variant", None)) is not None,
            f"experimental_attention_variant={variant!r} is not supported; leave it None",
        ),
        (
            not kinds <= {*KINDS, "none"},
            f"position_embedding_type={sorted(kinds)} is not supported; use one of "
            f"{sorted(KINDS)} or 'none'",
        ),
        (
            bool(unknown := _unknown_tables(chunks)),
            f"rotary_pos_emb is of class {', '.join(unknown)}, whose angles are not known here; "
            f"use one of {', '.join(sorted(name for known in KINDS.values() for name in known))}",
        ),
        (
            host.apply_rope_fusion,
            "apply_rope_fusion=True cannot rotate by arbitrary positions; set it False",
        ),
        (
            (window := getattr(host, "window_size", None)) is not None,
            f"window_size={window} is not supported, as after "
            "elision a window would count kept tokens, not positions; leave it None",
        ),
        (
            linear is not None or bool(hybrid),
            f"linear_attention_freq={linear} with is_hybrid_model={hybrid} is not supported; "
            "use full causal attention in all layers",
        ),
        (
            getattr(host, "heterogeneous_block_specs", False),
            "heterogeneous_block_specs=True is not supported, as layers may lack attention; set "
            "it False",
        ),
        (
            host.fp8 is not None
            and (host.fp8_dot_product_attention or host.fp8_multi_head_attention),
            f"fp8_dot_product_attention={host.fp8_dot_product_attention} with "
            f"fp8_multi_head_attention={host.fp8_multi_head_attention} is not tested; set both "
            "False (fp8 in the linear layers may stay)",
        ),
    ]


def _unknown_tables(chunks: Sequence[Any]) -> list[str]:
    """Return the classes of rotary tables that are not known for their kind of positions."""
    if chunks[0].config.multi_latent_attention:
        tables = [x.self_attention.rotary_pos_emb for gpt in chunks for x in gpt.decoder.layers]
        return sorted({type(table).__name__ for table in tables} - {*TABLES})
    found = {
        (gpt.position_embedding_type, type(gpt.rotary_pos_emb).__name__)
        for gpt in chunks
        if gpt.position_embedding_type in KINDS
    }
    return sorted(name for kind, name in found if name not in KINDS[kind])


def _attention_problems(chunks: Sequence[Any], *, ragged: bool) -> list[tuple[bool, str]]:
    layers = [layer.self_attention for gpt in chunks for layer in gpt.decoder.layers]
    masks = {mask.name for layer in layers if (mask := getattr(layer, "attn_mask_type", None))}
    # Bounds of ragged rows say where padding is. In the padded format kept rows have causal order
    # alone, because the host's padding mask is of the full rows.
    known = {"causal", "padding_causal"} if ragged else {"causal"}
    stock = any(type(getattr(x, "core_attention", None)) is DotProductAttention for x in layers)
    return [
        (
            not masks <= known,
            f"attn_mask_type={sorted(masks)} is not supported, as kept rows have no mask but "
            "causal order; build the layers with AttnMaskType.causal",
        ),
        (
            ragged and stock,
            "row_format='ragged' needs an attention that takes packed sequences "
            "(qkv_format='thd'), not DotProductAttention; build the layers with "
            "Transformer Engine's spec, or use row_format='padded'",
        ),
    ]


def _layout_problems(
    host: Any, *, last_layer: int | None, ends_early: bool
) -> list[tuple[bool, str]]:
    offloading = getattr(host, "fine_grained_activation_offloading", False)
    virtual = (mpu.get_virtual_pipeline_model_parallel_world_size() or 1) > 1
    graphs = getattr(host, "cuda_graph_impl", "none") or "none"
    enabled = getattr(host, "enable_cuda_graph", False)
    return [
        (
            getattr(host, "overlap_moe_expert_parallel_comm", False),
            "overlap_moe_expert_parallel_comm=True is not supported, as it does not call a layer's "
            "hooks; set it False",
        ),
        (
            getattr(host, "hybrid_context_parallel", False),
            "hybrid_context_parallel=True is not supported, as it divides each sample differently; "
            "set it False",
        ),
        (
            offloading or host.cpu_offloading,
            f"cpu_offloading={host.cpu_offloading} with fine_grained_activation_offloading="
            f"{offloading} is not supported; set both False",
        ),
        (
            graphs != "none" or enabled,
            f"cuda_graph_impl={graphs!r} with enable_cuda_graph={enabled} is not supported, as the "
            "number of kept tokens changes between steps; set them to 'none' and False",
        ),
        (
            host.tp_comm_overlap,
            "tp_comm_overlap=True is not supported, as it needs one sequence length for the whole "
            "run; set it False",
        ),
        (
            host.variable_seq_lengths,
            "variable_seq_lengths=True is not supported, as every rank reads shapes from the plan; "
            "set it False",
        ),
        (
            getattr(host, "distribute_saved_activations", False),
            "distribute_saved_activations=True is not supported; set it False",
        ),
        *_expert_problems(host),
        (
            ends_early and virtual,
            f"last_layer={last_layer} ends before the depth of {host.num_layers} layers, which is "
            "not supported with virtual pipeline parallelism; set last_layer to null, or train "
            "without interleaving",
        ),
    ]


def _expert_problems(host: Any) -> list[tuple[bool, str]]:
    if host.num_moe_experts is None:
        return []
    return [
        (
            host.moe_expert_capacity_factor is not None,
            f"moe_expert_capacity_factor={host.moe_expert_capacity_factor} is not supported, as it "
            "counts padding as tokens; leave it None",
        ),
        (
            # "allgather" assumes that all ranks have equally many tokens.
            host.moe_token_dispatcher_type != "alltoall",
            f"moe_token_dispatcher_type={host.moe_token_dispatcher_type!r} is not tested with "
            "uneven counts; use 'alltoall'",
        ),
    ]


def _range_problems(
    chunks: Sequence[nn.Module], config: RegateConfig, host: Any
) -> list[tuple[bool, str]]:
    depth, first = host.num_layers, config.first_layer
    last = depth if config.last_layer is None else config.last_layer
    virtual = (mpu.get_virtual_pipeline_model_parallel_world_size() or 1) > 1
    # Computed from the configuration alone, so that all ranks refuse together.
    per_chunk = depth // (
        mpu.get_pipeline_model_parallel_world_size()
        * (mpu.get_virtual_pipeline_model_parallel_world_size() or 1)
    )
    uneven = [name for name in _UNEVEN if getattr(host, name, None) not in (None, False)]
    num_layers = [len(gpt.decoder.layers) for gpt in chunks]
    additions = num_additions(chunks[0])
    return [
        (
            not 0 <= first < last <= depth,
            f"gated layers [{first}, {last}) do not fit a decoder of {depth} layers; set "
            "first_layer and last_layer within it",
        ),
        (
            last < depth and additions >= max(1, first),
            f"last_layer={last} ends before the depth, and the model adds image features behind "
            f"its first {additions} layers; set it to null, or first_layer above {additions}",
        ),
        (
            0 in num_layers,
            f"a pipeline stage without layers is not supported (chunks of this one: {num_layers}); "
            "give each stage at least one",
        ),
        (
            virtual and bool(uneven),
            f"interleaving with {', '.join(f'{name}={getattr(host, name)}' for name in uneven)} is "
            f"not supported; leave {', '.join(_UNEVEN)} unset",
        ),
        (
            virtual and first > per_chunk,
            f"first_layer={first} lies after the first virtual chunk ({per_chunk} layers), but "
            "with interleaving the gather must be in that chunk; lower first_layer",
        ),
    ]
