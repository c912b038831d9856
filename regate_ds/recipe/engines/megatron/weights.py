"""Turn weights of a Hugging Face decoder into Megatron-core's, and back.

into a model    every rank reads its cut of each weight
out of a model  the tensor ranks' cuts are joined, and each stage's weights go to the first rank
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from regate_ds.recipe.engines.megatron.names import (
    WeightMap,
    full_name,
    is_of_expert,
    parts_of,
    tensor_group,
)
from regate_ds.recipe.engines.megatron.transfer import receive_tensor, send_tensor
from regate_ds.teacher.sharding.weights import WeightCut, WeightSource

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class TextWeights:
    """A student's decoder and head, by their names in a causal LM."""

    student: WeightSource
    decoder: str
    """Name of the decoder in the student."""

    def __contains__(self, name: object) -> bool:
        return self._name(str(name)) in self.student

    def shape(self, name: str) -> tuple[int, ...]:
        return self.student.shape(self._name(name))

    def read(self, name: str, cut: WeightCut | None = None) -> Tensor:
        return self.student.read(self._name(name), cut)

    def _name(self, name: str) -> str:
        inside = name.removeprefix("model.")
        return name if inside == name else f"model.{self.decoder}.{inside}"


def load_cut(chunks: Sequence[nn.Module], source: WeightSource, config: Any) -> None:
    """Fill this rank's GPTModel chunks; ``source`` has the weights of a causal LM by name.

    Of each weight the rank reads its own cut, and nothing of the other stages' weights.
    """
    parts = {part.ours: part for part in parts_of(config)}
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            part = parts[name]
            dim = cut_dim(name, parameter)
            cut = part.join(*(_read_cut(source, one, dim) for one in part.theirs))
            if cut.shape != parameter.shape:
                raise ValueError(
                    f"{name} has {tuple(parameter.shape)} on this rank, but the student's cut has "
                    f"{tuple(cut.shape)}; choose parallel sizes that divide the student, or "
                    "correct its config.json"
                )
            parameter.copy_(cut)


def cut_dim(name: str, parameter: Any) -> int | None:
    """Return the dimension of a weight that tensor ranks cut; None if each has it whole."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    # Of experts' weights, megatron-core 0.16.1 lets Transformer Engine say 0 of all.
    is_row = name.endswith(("linear_fc2.weight", "linear_proj.weight"))
    return 1 if is_row else parameter.partition_dim


def _read_cut(source: WeightSource, name: str, dim: int | None) -> Tensor:
    """Read this tensor rank's part of a weight: queries, keys and gates are each cut evenly."""
    tensor = tensor_group(name)
    if tensor.size() == 1 or dim is None:
        return source.read(name)
    rank, length = tensor.rank(), source.shape(name)[dim] // tensor.size()
    return source.read(name, WeightCut(dim, rank * length, (rank + 1) * length))


def gather_to_first(chunks: Sequence[nn.Module], config: Any, device: torch.device) -> Weights:
    """Return all weights under Hugging Face's names on the job's first rank, else nothing.

    Collective over the job. They lie in CPU memory.
    """
    return gather_parts(dict(named_parameters(chunks)), list(parts_of(config)), device)


def gather_parts(
    own: Mapping[str, nn.Parameter], parts: Sequence[WeightMap], device: torch.device
) -> Weights:
    """Return those ``parts`` that any rank has as its ``own``, as ``gather_to_first`` does.

    They are sent one by one.
    """
    experts, stages = mpu.get_expert_model_parallel_group(), mpu.get_pipeline_model_parallel_group()
    is_first_copy = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    has = torch.tensor([part.ours in own for part in parts], dtype=torch.int32, device=device)
    has_EP = _of_all(has, experts)
    has_SP, found = _of_all(has_EP.amax(dim=0).to(device), stages), {}
    for number, part in enumerate(parts):
        is_shared, num_pieces = experts.size() > 1 and is_of_expert(part.ours), len(part.theirs)
        takes_part = mpu.get_expert_data_parallel_rank() == 0 if is_shared else is_first_copy
        if not takes_part or not has_SP[:, number].any():
            continue
        stage, expert = (int(has[:, number].argmax()) for has in (has_SP, has_EP))
        pieces: Sequence[Tensor] = ()
        if stages.rank() == stage:
            if not is_shared or experts.rank() == expert:
                pieces = _joined_cuts(part, own[part.ours])
            if is_shared:
                pieces = _to_first(pieces, expert, num_pieces, experts, device)
        if is_first_copy and mpu.get_tensor_model_parallel_rank() == 0:
            moved = _to_first(pieces, stage, num_pieces, stages, device)
            found |= {name: piece.cpu() for name, piece in zip(part.theirs, moved, strict=False)}
    return found


def _of_all(has_P: Tensor, group: Any) -> Tensor:
    """Return what all ranks of a group have, in CPU memory [ranks, P]."""
    found = [torch.empty_like(has_P) for _ in range(group.size())]
    dist.all_gather(found, has_P, group=group)
    return torch.stack(found).cpu()


def _joined_cuts(part: WeightMap, parameter: nn.Parameter) -> tuple[Tensor, ...]:
    """Join a weight's cuts from all tensor ranks. Collective over them."""
    tensor = tensor_group(part.ours)
    pieces = [torch.empty_like(parameter.data) for _ in range(tensor.size())]
    dist.all_gather(pieces, parameter.data.contiguous(), group=tensor)
    return part.split(_joined(part.ours, pieces, parameter))


def _to_first(
    pieces: Sequence[Tensor], owner: int, number: int, group: Any, device: torch.device
) -> Sequence[Tensor]:
    """Send ``number`` tensors from rank ``owner`` of a group to the first, which returns them."""
    if owner != 0 and group.rank() == owner:
        for piece in pieces:
            send_tensor(piece, 0, group)
    if owner != 0 and group.rank() == 0:
        return [receive_tensor(owner, group, device) for _ in range(number)]
    return pieces if group.rank() == 0 else ()


def named_parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of GPTModel chunks with their full names."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield full_name(chunk, name), parameter


def _joined(name: str, pieces: list[Tensor], parameter: Any) -> Tensor:
    dim = cut_dim(name, parameter)
    if len(pieces) == 1 or dim is None:
        return pieces[0]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half for i in (0, 1) for half in (p.chunk(2)[i] for p in pieces)])
    return torch.cat(pieces, dim=dim)
