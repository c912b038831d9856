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
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from regate_ds.recipe.engines.megatron.chunks import StudentChunk
from regate_ds.recipe.engines.megatron.trusted import require_plain

FOLDER = "megatron"
"""Name of the distributed checkpoint's folder in a checkpoint of the run."""


def save_shards(checkpoint: Path, chunks: Sequence[StudentChunk], optimizer: Any) -> None:
    """Write this rank's part of weights and optimizer. Collective over the job."""
    folder = checkpoint / FOLDER
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = _state(chunks, optimizer, is_loading=False)
    dist_checkpointing.save(state, str(folder), InThisProcess("torch_dist", 1))


def load_shards(checkpoint: Path, chunks: Sequence[StudentChunk], optimizer: Any) -> None:
    """Load this rank's part of what ranks of any layout have saved. Collective over the job.

    OSError if the checkpoint lacks a tensor, or one has another shape.
    """
    folder = checkpoint / FOLDER
    require_plain(folder)
    try:
        state = dist_checkpointing.load(
            _state(chunks, optimizer, is_loading=True), str(folder)
        )
    except CheckpointingException as error:
        raise OSError(f"{folder} is not of this model: {error}") from error
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{number}"])
    optimizer.load_state_dict(state["optimizer"])
    _part_steps(optimizer)


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
    model = {
        f"model{number}": chunk.sharded_state_dict(metadata=how)
        for number, chunk in enumerate(chunks)
    }
    optimized = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=how)
    return {**model, "optimizer": optimized}


def _part_steps(optimizer: Any) -> None:
    """Give each weight a step of its own.

    DistributedOptimizer (megatron-core 0.16.1 and 0.19.2) gives all weights one tensor as their
    step where it runs torch's optimizer, which then counts once for each of them.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in one.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
