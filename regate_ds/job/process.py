"""Join the job: this process's rank, its device, and the backend of the groups.

Only this file chooses between CUDA with NCCL and CPU with gloo.
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
"""Minutes that ranks wait for each other, unless DEEPSPEED_TIMEOUT is set. They wait long while the
first one writes a large model; DeepSpeed's own 10 minutes would end the run then."""


@dataclass(frozen=True)
class Process:
    """The place of this process in the job."""

    rank: int
    world_size: int
    device: torch.device
    among: dist.ProcessGroup | None = None
    """The group of the ranks that count, if they are not all ranks of the job."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of the ranks that count; None if this process is the only one."""
        if self.world_size == 1:
            return None
        return self.among or dist.group.WORLD


def start_process() -> Process:
    """Join the job that a launcher announced in the environment, or start one of one process."""
    ranks = announce()
    is_alone = ranks.launcher == "none"
    if is_alone:
        _announce_single_process()
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", ranks.local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # Set before deepspeed is imported, which chooses its accelerator once.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _init_groups(backend, is_alone)
    return Process(ranks.rank, ranks.world_size, device)


def _announce_single_process() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(free_port()))


def _init_groups(backend: str, is_alone: bool) -> None:
    import deepspeed.ops
    from deepspeed import init_distributed

    if backend == "gloo":
        # On CPUs, deepspeed 0.19.8 builds a shared-memory op whose collectives ignore their group.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    minutes = os.environ.get("DEEPSPEED_TIMEOUT", _PATIENCE)
    if not minutes.isdecimal() or int(minutes) == 0:
        raise ValueError(f"DEEPSPEED_TIMEOUT={minutes}: must be a whole number of minutes above 0")
    patience = timedelta(minutes=int(minutes))
    if is_alone and not dist.is_initialized():
        # Nobody else is to find this process, so it need not listen on a port, which others take.
        store = dist.HashStore()  # type: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=patience)
    init_distributed(dist_backend=backend, verbose=False, timeout=patience)
