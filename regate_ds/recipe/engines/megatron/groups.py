"""Make Megatron's groups for a run, and a group over which a replica shares a step's figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from regate_ds.adapters.megatron.groups import rank_table
from regate_ds.job.process import Process
from regate_ds.parallel.layout import cpu_group, replicas
from regate_ds.recipe.config.tree import RunConfig


def join(config: RunConfig, process: Process) -> Process:
    """Make the groups, and return this process among the data ranks. Collective over the job."""
    parallel = config.parallel
    assert parallel is not None
    require_device()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(config.run.seed)
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    return Process(rank, size, process.device, mpu.get_data_parallel_group())


def require_device() -> None:
    """Refuse, by ValueError, a job without a GPU: Megatron-core makes its small tensors on it."""
    try:
        torch.cuda.current_device()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"parallel.*: Megatron-core needs a GPU, and torch finds none ({error}); set "
            "parallel=null to train on CPUs"
        ) from None


@dataclass(frozen=True)
class Replica:
    """The ranks that hold one copy of the model; their planner has the losses."""

    group: dist.ProcessGroup | None
    planner: int
    """Rank in the world of the last stage's first tensor and context rank."""

    @classmethod
    def of_this_rank(cls) -> Replica:
        """Return the replica that this rank belongs to. Collective over the job."""
        table = rank_table()
        groups = replicas([data_rank for data_rank, _ in table])
        own = next(ranks for ranks in groups if dist.get_rank() in ranks)
        return cls(cpu_group(groups), next(rank for rank in own if table[rank][1]))

    def broadcast(self, value: Any) -> Any:
        """Return the planner's value on all ranks. Collective over the replica."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, self.planner, group=self.group)
        return values[0]
