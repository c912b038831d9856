"""This process among those of the job: its rank, its device, and the group's backend.

The one place that decides between CUDA with NCCL and CPU with gloo.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from regate_ds.training.launcher import free_port

_PATIENCE = "360"
"""Minutes that ranks wait for each other unless DEEPSPEED_TIMEOUT says otherwise, as they do while
the first one writes a large model; DeepSpeed's own 10 would end the run there."""


@dataclass(frozen=True)
class Process:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    device: torch.device
    among: dist.ProcessGroup | None = None
    """The ranks that are counted, where they are not all of the job."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that are counted; None if this is the only one."""
        if self.world_size == 1:
            return None
        return self.among or dist.group.WORLD


def start_process(local_rank: int | None = None) -> Process:
    """Join the job that a launcher announced in the environment, or be a job of one process."""
    require_launched()
    _announce_single_process()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if local_rank is None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # Before deepspeed is imported: it picks its accelerator once.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _init_groups(backend)
    return Process(rank, world_size, device)


def require_launched() -> None:
    """ValueError if a launcher has announced half a job, or started ranks that know of none."""
    names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    lacks = [name for name in names if name not in os.environ]
    if "RANK" in os.environ and lacks:
        raise ValueError(
            f"RANK={os.environ['RANK']}, but {', '.join(lacks)} not set: start by deepspeed, "
            "torchrun or launch/, or unset RANK to run one process"
        )
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and tasks != "1":
        raise ValueError(
            f"SLURM_NTASKS={tasks}, but RANK is not set: each task would be a run of its own; set "
            "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each task, start by "
            "deepspeed or torchrun, or set SLURM_NTASKS=1 to run one process"
        )


def _announce_single_process() -> None:
    if "RANK" in os.environ:
        return
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(free_port()))


def _init_groups(backend: str) -> None:
    import deepspeed.ops
    from deepspeed import init_distributed

    if backend == "gloo":
        # deepspeed 0.19.8 on CPUs builds a shared-memory op whose collectives ignore their group.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patience = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", _PATIENCE)))
    init_distributed(dist_backend=backend, verbose=False, timeout=patience)
