"""The frozen teacher, cut by heads over the ranks of a replica with ``deepspeed.init_inference``.

A sharded teacher, here and in zero3.py, is built without values and then filled tensor by tensor,
so that no rank ever holds all of it. ``score_samples`` sees any causal language model: a decoder
``model`` and an ``lm_head``. Build it before the student, because DeepSpeed keeps one mode of its
layers for the whole process.

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
"""Limit of a rank's parameters without the embedding, as a multiple of its share by heads."""


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
        """Yield each weight's name in the whole model, its module, and its name in the module.

        A head that shares the embedding's weight is left out.
        """
        for path, module in self.model.named_modules(prefix="model"):
            for name, _ in module.named_parameters(recurse=False):
                yield f"{path}.{name}", module, name
        for name, _ in self.lm_head.project.named_parameters():
            if name != "weight" or not is_tied(self.config):
                yield f"lm_head.{name}", self.lm_head, f"project.{name}"


def cut_teacher(
    config: PreTrainedConfig,
    replica: ProcessGroup,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> ShardedTeacher:
    """Build a teacher without values: this rank's attention heads and ids, and all embedding rows.

    Collective over the *world*, though only the ranks of ``replica`` hold this teacher together.

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
    """Read this rank's part of a ``cut_teacher``. Not collective: ranks may take turns."""
    for whole_name, module, name in teacher.weights_by_name():
        part = weights.read(whole_name, _cut_of(module, name))
        module.get_parameter(name).copy_(part)


def is_tied(config: Any) -> bool:
    """Return whether the head shares the embedding's weight."""
    return bool(config.tie_word_embeddings)


def require_plain_weights(config: Any) -> None:
    """Refuse, by ValueError, a quantized teacher: the codes in its files would pass for values."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"teacher.path: a quantized {config.model_type} model cannot be sharded; give it "
            "unquantized or as a GGUF file, or set teacher.sharding=none"
        )


def require_cuttable(config: Any, num_ranks: int) -> None:
    """Refuse, by ValueError, a teacher that DeepSpeed would cut wrongly, or not at all."""
    supported = decoders_that("shards")
    if config.model_type not in supported:
        raise ValueError(
            f"teacher.sharding=tensor: a {config.model_type} model is not known to be cut right; "
            f"these are: {', '.join(supported)}; use one, or set teacher.sharding=zero3"
        )
    if num_ranks > config.num_key_value_heads:
        raise ValueError(
            f"teacher.tensor={num_ranks}: the teacher has {config.num_key_value_heads} key-value "
            "heads, so that a rank would have none; lower it, or set teacher.sharding=zero3"
        )


def require_share(
    teacher: ShardedTeacher, whole_sizes: dict[str, int], replica: ProcessGroup
) -> None:
    """Raise RuntimeError if this rank holds more than the embedding and SLACK times its share.

    whole_sizes: number of parameters of each weight of the whole decoder, by name. A rank's share
    of attention is that of its key-value heads; its share of all else is one part for each rank.
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
            f"the others, {share:.0f}: DeepSpeed has not cut them; set teacher.sharding=zero3"
        )


class _Ranks:
    """The groups as ``deepspeed.init_inference`` asks for them, in Megatron's form.

    Without this object it does not cut; without its group as an argument it takes the first ranks.
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
    """Cut each layer to this rank's part, without values."""
    ranks = _Ranks(replica)
    # DeepSpeed prints what it does, on every rank.
    with random_state_kept(), redirect_stdout(StringIO()):
        wrapped = deepspeed.init_inference(
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
    return wrapped.module


def _cut_head(config: Any, decoder: nn.Module, replica: ProcessGroup) -> HeadPart:
    start, stop = _part(config.vocab_size, replica)
    embedding_VH: Tensor = decoder.embed_tokens.weight.data  # type: ignore[union-attr]
    # A tied head is a view: it takes no memory, and gets its values with the embedding.
    part_VH = embedding_VH[start:stop]
    weight_VH = part_VH if is_tied(config) else torch.empty_like(part_VH)
    head = nn.Linear(*reversed(weight_VH.shape), bias=False, device="meta")
    head.weight = nn.Parameter(weight_VH, requires_grad=False)
    return HeadPart(head, start, replica)


def _part(total: int, replica: ProcessGroup) -> tuple[int, int]:
    """Return start and end of this rank's part of ``total``; the first ranks take the remainder."""
    size, remainder = divmod(total, size_of(replica))
    rank = rank_in(replica)
    start = rank * size + min(rank, remainder)
    return start, start + size + (rank < remainder)


def _cut_of(module: nn.Module, name: str) -> WeightCut | None:
    """Return the part of the whole tensor that this module holds; None if it holds all of it."""
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
    """Compute the rotary table again: it is not a weight, and lost its values on "meta", or its
    precision where DeepSpeed cast it to the weights' dtype."""
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)


def _require_sums_of_groups() -> None:
    if hasattr(torch.ops.deepspeed, "inference_all_reduce_"):
        raise RuntimeError(
            "DeepSpeed's shared-memory op inference_all_reduce_ is loaded, whose sums ignore their "
            'group; set deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False before '
            "deepspeed.init_distributed"
        )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Keep the random state as it is during the block, in which DeepSpeed seeds all ranks alike."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
