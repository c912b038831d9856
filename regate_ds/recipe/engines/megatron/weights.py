"""Turn weights of a Llama-shaped Hugging Face decoder into Megatron-core's, and back.

full names      Megatron's names, with layers counted through the whole model
into a model    every rank takes its cut of each full weight
out of a model  the tensor ranks' cuts are joined, and the stages' weights are put together
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

Weights = dict[str, Tensor]


_PLAIN = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
"""Names inside a layer that hold one weight in both forms: Megatron's, then Hugging Face's."""

_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Names outside the layers, in the same order."""

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Names of norms where Transformer Engine's linear layers hold them, and their plain names."""


@dataclass(frozen=True)
class WeightMap:
    """A full weight of Megatron-core, and the Hugging Face weights that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[..., Tensor] = lambda weight: weight
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda full: (full,)


def parts_of(config: Any) -> Iterator[WeightMap]:
    """Yield every weight that a decoder with this Hugging Face config may have."""
    for ours, theirs in _OUTSIDE_LAYERS.items():
        yield WeightMap(ours, (theirs,))
    for number in range(config.num_hidden_layers):
        at, to = f"model.layers.{number}.", f"decoder.layers.{number}."
        for ours, theirs in _PLAIN.items():
            yield WeightMap(to + ours, (at + theirs,))
        for kind in ("weight", "bias"):
            names = tuple(f"{at}self_attn.{x}_proj.{kind}" for x in "qkv")
            heads = partial(_join_heads, config), partial(_split_heads, config)
            yield WeightMap(f"{to}self_attention.linear_qkv.{kind}", names, *heads)
        names = tuple(f"{at}mlp.{x}_proj.weight" for x in ("gate", "up"))
        yield WeightMap(f"{to}mlp.linear_fc1.weight", names, _join_halves, _split_halves)


def to_megatron(weights: Mapping[str, Tensor], config: Any) -> Weights:
    """Return the full weights of a causal LM under Megatron's names."""
    present = (part for part in parts_of(config) if part.theirs[0] in weights)
    return {part.ours: part.join(*(weights[name] for name in part.theirs)) for part in present}


def from_megatron(full: Mapping[str, Tensor], config: Any) -> Weights:
    """Return weights under Hugging Face's names; the inverse of ``to_megatron``."""
    weights: Weights = {}
    for part in parts_of(config):
        if part.ours in full:
            weights |= dict(zip(part.theirs, part.split(full[part.ours]), strict=True))
    return weights


def head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def _join_heads(config: Any, *query_key_value: Tensor) -> Tensor:
    """Join in Megatron's order: each group's queries, then its key, then its value."""
    groups, rest = config.num_key_value_heads, query_key_value[0].shape[1:]
    parts = [x.view(groups, -1, head_size(config), *rest) for x in query_key_value]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def _split_heads(config: Any, joined: Tensor) -> tuple[Tensor, ...]:
    groups, rest = config.num_key_value_heads, joined.shape[1:]
    parts = joined.view(groups, -1, head_size(config), *rest)
    sizes = [config.num_attention_heads // groups, 1, 1]
    return tuple(x.reshape(-1, *rest) for x in parts.split(sizes, dim=1))


def _join_halves(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up])


def _split_halves(full: Tensor) -> tuple[Tensor, ...]:
    return full.chunk(2)


def load_full(chunks: Sequence[nn.Module], full: Mapping[str, Tensor]) -> None:
    """Fill this rank's GPTModel chunks with its cut of every weight."""
    size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            cut = _pieces(name, full[name], parameter, size)[rank]
            if cut.shape != parameter.shape:
                raise ValueError(
                    f"{name} has {tuple(parameter.shape)} on this rank, but the student's cut has "
                    f"{tuple(cut.shape)}; choose parallel sizes that divide the student"
                )
            parameter.copy_(cut)


def gather_full(chunks: Sequence[nn.Module]) -> Weights:
    """Return all weights of the model, in CPU memory on every rank.

    Collective over the ranks that hold the model together.
    """
    size, found = mpu.get_tensor_model_parallel_world_size(), {}
    for name, parameter in named_parameters(chunks):
        pieces = [torch.empty_like(parameter.data) for _ in range(size)]
        dist.all_gather(
            pieces, parameter.data.contiguous(), group=mpu.get_tensor_model_parallel_group()
        )
        found[name] = _joined(name, pieces, parameter).cpu()
    stages: list[Any] = [None] * mpu.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, found, group=mpu.get_pipeline_model_parallel_group())
    return {name: value for stage in stages for name, value in stage.items()}


def named_parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of GPTModel chunks with their full names."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _full_name(chunk, name), parameter


def _full_name(chunk: Any, name: str) -> str:
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    inside = ".".join(parts[3:])
    return (
        ".".join([*parts[:3], _FUSED_NORMS[inside]]) if inside in _FUSED_NORMS else ".".join(parts)
    )


def _pieces(name: str, full: Tensor, parameter: Any, size: int) -> list[Tensor]:
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return [full] * size
    if "linear_fc1" in name:
        # Gate and value are each cut over the ranks.
        gates, values = (half.chunk(size) for half in full.chunk(2))
        return [torch.cat(pair) for pair in zip(gates, values, strict=True)]
    return list(full.chunk(size, dim=parameter.partition_dim))


def _joined(name: str, pieces: list[Tensor], parameter: Any) -> Tensor:
    if len(pieces) == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return pieces[0]
    if "linear_fc1" in name:
        return torch.cat([half for i in (0, 1) for half in (p.chunk(2)[i] for p in pieces)])
    return torch.cat(pieces, dim=parameter.partition_dim)
