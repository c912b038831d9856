"""The frozen teacher cut by heads over the ranks of a replica, by DeepSpeed's inference engine.

A sharded teacher, here and in partition.py, is built without values and then filled tensor by
tensor, so that no rank ever holds the whole. To ``score_samples`` it looks like any causal language
model: a decoder ``model`` and an ``lm_head``. Build it before the student: DeepSpeed keeps the mode
of its layers for the whole process.

Shapes: V ids of this rank's part of the head, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from regate_ds.families.text_decoders import decoders_that
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.teacher.head_loss import HeadPart
from regate_ds.teacher.sharding.weights import WeightCut, WeightSource

SLACK = 1.05
"""Largest number of a rank's parameters, as a multiple of its share by heads; embedding apart."""


class ShardedTeacher(nn.Module):
    """A decoder of which this rank holds a part, and its head."""

    def __init__(self, config: PreTrainedConfig, model: nn.Module, lm_head: HeadPart) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.lm_head = lm_head
        self.eval().requires_grad_(False)

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def weights_by_name(self) -> Iterator[tuple[str, nn.Module, str]]:
        """The whole model's name of each weight, its module, and its name there; a shared weight
        comes once, with the embedding."""
        for path, module in self.model.named_modules(prefix="model"):
            for name, _ in module.named_parameters(recurse=False):
                yield f"{path}.{name}", module, name
        if not is_tied(self.config):
            yield "lm_head.weight", self.lm_head, "project.weight"


def cut_teacher(
    config: PreTrainedConfig,
    replica: ProcessGroup,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> ShardedTeacher:
    """A teacher without values: this rank's heads, its ids of the head, and the whole embedding.

    Collective over the *world*, though only the ranks of ``replica`` hold this one together.

    ValueError for an architecture that would be cut wrongly, RuntimeError if this rank would hold
    more than its share.
    """
    require_plain_weights(config)
    require_cuttable(config, size_of(replica))
    _require_sums_of_groups()
    with random_state_kept(), torch.device("meta"):
        decoder = AutoModel.from_config(config, dtype=dtype)
    whole_sizes = {name: value.numel() for name, value in decoder.named_parameters()}
    decoder = _cut_layers(decoder, replica, dtype)
    renew_rotary(decoder, config, device)
    teacher = ShardedTeacher(config, decoder, _cut_head(config, decoder, replica))
    require_share(teacher, whole_sizes, replica)
    return teacher


@torch.no_grad()
def fill_cut(teacher: ShardedTeacher, weights: WeightSource) -> None:
    """Read this rank's part of a ``cut_teacher``. No collective: ranks may take turns."""
    for whole_name, module, name in teacher.weights_by_name():
        part = weights.read(whole_name, _cut_of(module, name))
        module.get_parameter(name).copy_(part)


def is_tied(config: Any) -> bool:
    """Whether the head is the embedding."""
    return bool(config.tie_word_embeddings)


def require_plain_weights(config: Any) -> None:
    """ValueError for a quantized teacher: its files hold codes, which would be taken for values."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"teacher.path: a quantized {config.model_type} model cannot be sharded; give it "
            "unquantized or as a GGUF file, or set teacher.sharding=none"
        )


def require_cuttable(config: Any, num_ranks: int) -> None:
    """ValueError for a teacher that DeepSpeed would cut wrongly, or not at all."""
    cut_right = decoders_that("shards")
    if config.model_type not in cut_right:
        raise ValueError(
            f"teacher.sharding=tensor: a {config.model_type} model is not known to be cut right; "
            f"these are: {', '.join(cut_right)}; use teacher.sharding=zero3"
        )
    if num_ranks > config.num_key_value_heads:
        raise ValueError(
            f"teacher.tensor={num_ranks}: the teacher has {config.num_key_value_heads} key-value "
            "heads, so that a rank would have none; use fewer ranks, or teacher.sharding=zero3"
        )


def require_share(
    teacher: ShardedTeacher, whole_sizes: dict[str, int], replica: ProcessGroup
) -> None:
    """RuntimeError if this rank holds more than the embedding and 1.05 of its share of the rest.

    ``whole_sizes``: numbers of parameters of the whole decoder, by name. The share of attention is
    that of the key-value heads, of everything else one rank's.
    """
    config: Any = teacher.config
    start, stop = _part(config.num_key_value_heads, replica)
    attention = sum(size for name, size in whole_sizes.items() if ".self_attn." in name)
    embedding = whole_sizes["embed_tokens.weight"]
    others = sum(whole_sizes.values()) - attention - embedding
    others += 0 if is_tied(config) else embedding
    share = attention * (stop - start) / config.num_key_value_heads + others / size_of(replica)
    weights = {id(m.get_parameter(n)): m.get_parameter(n) for _, m, n in teacher.weights_by_name()}
    num_held = sum(weight.numel() for weight in weights.values())
    if num_held > embedding + SLACK * share:
        raise RuntimeError(
            f"rank {rank_in(replica)} of {size_of(replica)} holds {num_held} parameters of the "
            f"teacher, more than the embedding's {embedding} and {SLACK} of its share by heads of "
            f"the others, {share:.0f}: DeepSpeed has not cut them; use teacher.sharding=zero3"
        )


class _Ranks:
    """What DeepSpeed's inference engine asks of a Megatron-like owner of groups.

    Without it the engine does not cut; without its group as an argument it takes the first ranks.
    """

    def __init__(self, replica: ProcessGroup) -> None:
        self._replica = replica

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._replica

    def get_model_parallel_rank(self) -> int:
        return rank_in(self._replica)

    def get_model_parallel_world_size(self) -> int:
        return size_of(self._replica)


def _cut_layers(decoder: nn.Module, replica: ProcessGroup, dtype: torch.dtype) -> nn.Module:
    """Give each layer this rank's part, without values."""
    ranks = _Ranks(replica)
    # The engine prints what it does, on every rank.
    with random_state_kept(), redirect_stdout(StringIO()):
        engine = deepspeed.init_inference(
            decoder,
            dtype=dtype,
            replace_with_kernel_inject=False,
            tensor_parallel={
                "tp_size": size_of(replica),
                "mpu": ranks,
                "tp_group": ranks.get_model_parallel_group(),
                "tp_grain_size": 1,
            },
        )
    return engine.module


def _cut_head(config: Any, decoder: nn.Module, replica: ProcessGroup) -> HeadPart:
    start, stop = _part(config.vocab_size, replica)
    embedding_VH: Tensor = decoder.embed_tokens.weight.data  # type: ignore[union-attr]
    # A tied head is a view: it takes no memory, and is filled with the embedding.
    part_VH = embedding_VH[start:stop]
    weight_VH = part_VH if is_tied(config) else torch.empty_like(part_VH)
    head = nn.Linear(*reversed(weight_VH.shape), bias=False, device="meta")
    head.weight = nn.Parameter(weight_VH, requires_grad=False)
    return HeadPart(head, start, replica)


def _part(total: int, replica: ProcessGroup) -> tuple[int, int]:
    """Start and end of this rank's part of so many things, the first ranks' one longer."""
    size, more = divmod(total, size_of(replica))
    rank = rank_in(replica)
    start = rank * size + min(rank, more)
    return start, start + size + (rank < more)


def _cut_of(module: nn.Module, name: str) -> WeightCut | None:
    """Which part of the whole tensor a module of DeepSpeed's, or a head, holds; None for all."""
    if isinstance(module, HeadPart):
        return WeightCut(0, module.first_id, module.first_id + module.get_parameter(name).shape[0])
    if isinstance(module, LinearLayer):
        dim = 0
    elif isinstance(module, LinearAllreduce) and name == "weight":
        dim = 1
    else:
        return None
    sizes, rank = module._partition_sizes, module.tp_index
    return WeightCut(dim, sum(sizes[:rank]), sum(sizes[: rank + 1]))


def renew_rotary(decoder: Any, config: Any, device: torch.device | str) -> None:
    """The rotary table is no weight: it lost its values on "meta", or its digits where DeepSpeed
    put it into the weights' number format."""
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)


def _require_sums_of_groups() -> None:
    if hasattr(torch.ops.deepspeed, "inference_all_reduce_"):
        raise RuntimeError(
            "DeepSpeed's shared-memory op is loaded, whose sums ignore their group; set "
            'deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False before '
            "deepspeed.init_distributed"
        )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random state as it was found: DeepSpeed sets it on all ranks alike."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
