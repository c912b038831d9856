"""Make Megatron's groups for a run."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from regate_ds.job.process import Process
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
        expert_model_parallel_size=parallel.expert,
        # An expert is whole on one rank, or cut over the tensor ranks: tokens of several ranks that
        # go to a part of an expert would be gathered unevenly, which gloo cannot do.
        expert_tensor_parallel_size=1 if parallel.expert > 1 else parallel.tensor,
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
