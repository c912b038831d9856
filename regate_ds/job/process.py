"""This process among those of the job: its rank, its device, and the group's backend.

The one place that decides between CUDA with NCCL and CPU with gloo.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from regate_ds.job.deepspeed_launcher import free_port
from regate_ds.job.ranks import announce

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


def start_process() -> Process:
    """Join the job that a launcher announced in the environment, or be a job of one process."""
    ranks = announce()
    if ranks.launcher == "none":
        _announce_single_process()
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", ranks.local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # Before deepspeed is imported: it picks its accelerator once.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _init_groups(backend)
    return Process(ranks.rank, ranks.world_size, device)


def _announce_single_process() -> None:
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
