"""Weights and optimizer in Megatron-core's own distributed checkpoint (format torch_dist).

Each tensor is stored under its name in the whole model, cut as the saving ranks held it. A rank of
any layout reads the parts that it needs, so a run may go on under another one. What belongs to a
rank and not to the model, its random states, lies in a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from regate_ds.recipe.engines.megatron.checkpoint.trusted import require_harmless
from regate_ds.recipe.engines.megatron.chunks import StudentChunk

_FOLDER = "megatron"
"""Name of the distributed checkpoint's folder in a checkpoint of the run."""


def save_shards(checkpoint: Path, chunks: Sequence[StudentChunk], optimizer: Any) -> None:
    """Write this rank's part of weights and optimizer. Collective over the job.

    OSError if a rank cannot write.
    """
    folder = checkpoint / _FOLDER
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = _state(chunks, optimizer, is_loading=False)
    try:
        dist_checkpointing.save(state, str(folder), InThisProcess("torch_dist", 1))
    except CheckpointException as error:
        raise OSError(_first_line(error)) from error


def load_shards(checkpoint: Path, chunks: Sequence[StudentChunk], optimizer: Any) -> None:
    """Load this rank's part of what ranks of any layout have saved. Collective over the job.

    OSError if it cannot be read, lacks a tensor, or one has another shape; what might run code is
    refused as in ``require_harmless``.
    """
    folder = checkpoint / _FOLDER
    require_harmless(folder)
    _begin_steps(optimizer)
    try:
        state = dist_checkpointing.load(_state(chunks, optimizer, is_loading=True), str(folder))
    except CheckpointException as error:
        raise OSError(_first_line(error)) from error
    except CheckpointingException as error:
        raise OSError(str(error)) from error
    for number, chunk in enumerate(chunks):
        others = chunk.load_state_dict(state[f"model{number}"], strict=False)
        assert not others.unexpected_keys
        assert all(_is_extra(name) for name in others.missing_keys), others
    _load_optimizer(optimizer, state["optimizer"])


class InThisProcess(TorchDistSaveShardedStrategy):
    """Writes as Megatron-core's strategy does, but in the process that asks for it.

    Its own forks a writer from a process with threads and a device, beside a server that outlives a
    process that is killed (megatron-core 0.16.1 and 0.19.2).
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        tensors, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(tensors),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_random(checkpoint: Path) -> None:
    """Write this rank's random states: one that tensor ranks share, and one of its own."""
    torch.save(get_cuda_rng_tracker().get_states(), _random_file(checkpoint))


def load_random(checkpoint: Path) -> None:
    """Load what this rank wrote; the layout of the ranks must be the same."""
    states = torch.load(_random_file(checkpoint), weights_only=True)
    get_cuda_rng_tracker().set_states({name: state.cpu() for name, state in states.items()})


def _random_file(checkpoint: Path) -> Path:
    return checkpoint / f"megatron-random-{dist.get_rank()}.pt"


def _state(chunks: Sequence[StudentChunk], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """Return this rank's tensors with their places in the whole model."""
    how = {
        # The optimizer's state in the shapes of the weights, whatever the data ranks hold of it.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    model = {f"model{number}": _tensors(chunk, how) for number, chunk in enumerate(chunks)}
    optimized = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=how)
    return {**model, "optimizer": optimized}


def _tensors(chunk: StudentChunk, how: dict[str, Any]) -> dict[str, Any]:
    named = chunk.sharded_state_dict(metadata=how)
    return {name: tensor for name, tensor in named.items() if not _is_extra(name)}


def _is_extra(name: str) -> bool:
    """Return whether a name is of a layer's scales for fp8, which the recipe does not have."""
    return name.endswith("._extra_state")


def _first_line(error: CheckpointException) -> str:
    """Return what went wrong, and on which rank: torch's own text is a traceback of each."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _begin_steps(optimizer: Any) -> None:
    """Give a new torch optimizer the state that DistributedOptimizer asks for before it loads."""
    for one in filter(_is_distributed_on_torch, _parts(optimizer)):
        one.init_state_fn(one.optimizer, one.config)
        for state in one.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _load_optimizer(optimizer: Any, loaded: Any) -> None:
    """Load the optimizer's state.

    DistributedOptimizer on torch's AdamW (megatron-core 0.16.1 and 0.19.2) looks for a step among
    the loaded tensors, where there is none, and gives all weights one tensor as their step, which
    counts up once for each of them. So steps are taken away meanwhile, and parted then.
    """
    parts = _parts(optimizer)
    for one, state in zip(parts, [loaded] if len(parts) == 1 else loaded.values(), strict=True):
        if not _is_distributed_on_torch(one):
            one.load_state_dict(state)
            continue
        tensors = state.pop("param_state")
        one.load_state_dict(state)
        of_weights = one.optimizer.state
        steps = {weight: of_weight.pop("step") for weight, of_weight in of_weights.items()}
        one.load_parameter_state_from_fully_reshardable(tensors)
        for weight, step in steps.items():
            of_weights[weight]["step"] = step.clone()


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _is_distributed_on_torch(one: Any) -> bool:
    return isinstance(one, DistributedOptimizer) and isinstance(one.optimizer, torch.optim.Adam)
