"""Turn weights of a Llama-shaped Hugging Face decoder into Megatron-core's, and back.

full names      Megatron's names, with layers counted through the whole model
into a model    every rank reads its cut of each weight
out of a model  the tensor ranks' cuts are joined, and each stage's weights go to the first rank
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

from regate_ds.recipe.engines.megatron.transfer import receive_tensor, send_tensor
from regate_ds.teacher.sharding.weights import WeightCut, WeightSource

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


def head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def _join_heads(config: Any, *query_key_value: Tensor) -> Tensor:
    """Join in Megatron's order: each group's queries, then its key, then its value.

    They may be a tensor rank's part, of some of the groups.
    """
    groups, rest = len(query_key_value[1]) // head_size(config), query_key_value[0].shape[1:]
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


def load_cut(chunks: Sequence[nn.Module], source: WeightSource, config: Any) -> None:
    """Fill this rank's GPTModel chunks; ``source`` has the weights of a causal LM by name.

    Of each weight the rank reads its own cut, and nothing of the other stages' weights.
    """
    parts = {part.ours: part for part in parts_of(config)}
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            part = parts[name]
            cut = part.join(*(_read_cut(source, one, parameter) for one in part.theirs))
            if cut.shape != parameter.shape:
                raise ValueError(
                    f"{name} has {tuple(parameter.shape)} on this rank, but the student's cut has "
                    f"{tuple(cut.shape)}; choose parallel sizes that divide the student, or "
                    "correct its config.json"
                )
            parameter.copy_(cut)


def _read_cut(source: WeightSource, name: str, parameter: Any) -> Tensor:
    """Read this tensor rank's part of a weight: queries, keys and gates are each cut evenly."""
    size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return source.read(name)
    dim = parameter.partition_dim
    length = source.shape(name)[dim] // size
    return source.read(name, WeightCut(dim, rank * length, (rank + 1) * length))


def gather_to_first(chunks: Sequence[nn.Module], config: Any, device: torch.device) -> Weights:
    """Return all weights under Hugging Face's names on each replica's first rank, else nothing.

    Collective over the ranks that hold the model together. They lie in CPU memory.
    """
    return gather_parts(dict(named_parameters(chunks)), list(parts_of(config)), device)


def gather_parts(
    own: Mapping[str, nn.Parameter], parts: Sequence[WeightMap], device: torch.device
) -> Weights:
    """Return those ``parts`` that any rank has as its ``own``, as ``gather_to_first`` does.

    They are sent one by one.
    """
    has = torch.tensor([part.ours in own for part in parts], dtype=torch.int32, device=device)
    stages = mpu.get_pipeline_model_parallel_group()
    of_stages = [torch.empty_like(has) for _ in range(stages.size())]
    dist.all_gather(of_stages, has, group=stages)
    has_SP, found = torch.stack(of_stages).cpu(), {}
    for number, part in enumerate(parts):
        if not has_SP[:, number].any():
            continue
        owner = int(has_SP[:, number].int().argmax())
        pieces = _joined_cuts(part, own[part.ours]) if stages.rank() == owner else ()
        if mpu.get_tensor_model_parallel_rank() == 0:
            moved = _to_first_stage(pieces, owner, len(part.theirs), device)
            found |= dict(zip(part.theirs, moved, strict=False))
    return found


def _joined_cuts(part: WeightMap, parameter: nn.Parameter) -> tuple[Tensor, ...]:
    """Join a weight's cuts from all tensor ranks. Collective over them."""
    tensor = mpu.get_tensor_model_parallel_group()
    pieces = [torch.empty_like(parameter.data) for _ in range(tensor.size())]
    dist.all_gather(pieces, parameter.data.contiguous(), group=tensor)
    return part.split(_joined(part.ours, pieces, parameter))


def _to_first_stage(
    pieces: Sequence[Tensor], owner: int, number: int, device: torch.device
) -> list[Tensor]:
    """Send tensors from stage ``owner`` to the first, which returns them, on the CPU."""
    stages = mpu.get_pipeline_model_parallel_group()
    if stages.rank() == 0 and owner == 0:
        return [piece.cpu() for piece in pieces]
    if stages.rank() == owner:
        for piece in pieces:
            send_tensor(piece, 0, stages)
    if stages.rank() == 0:
        return [receive_tensor(owner, stages, device).cpu() for _ in range(number)]
    return []


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


def _joined(name: str, pieces: list[Tensor], parameter: Any) -> Tensor:
    if len(pieces) == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return pieces[0]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half for i in (0, 1) for half in (p.chunk(2)[i] for p in pieces)])
    return torch.cat(pieces, dim=parameter.partition_dim)
