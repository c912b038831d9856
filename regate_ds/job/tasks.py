"""Read which task of srun or of MPI this process is. Imports no framework.

SLURM_PROCID ...        a task of srun
OMPI_COMM_WORLD_RANK    a task of Open MPI's mpirun
PMI_RANK ...            a task of mpiexec, of MPICH and what comes from it (Intel MPI, PALS)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_OPENMPI = ("RANK", "SIZE", "LOCAL_RANK")

_PMI_LOCAL = ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "MV2_COMM_WORLD_LOCAL_RANK")
"""Names under which a task of mpiexec may find its number on its node."""


@dataclass(frozen=True)
class Announcement:
    """One announcement: number ``index`` of ``size``, read from the variables of these names."""

    launcher: str
    index: int
    size: int
    local_rank: int
    index_name: str
    size_name: str

    def __str__(self) -> str:
        return f"{self.index_name}={self.index}, {self.size_name}={self.size}"


def task_of(environment: Mapping[str, str]) -> Announcement | None:
    """Return the task of MPI or srun that this process is, or runs in; None if there is none."""
    srun = _srun(environment)
    mpi = _mpirun(environment) or _mpiexec(environment, srun)
    if srun is None or mpi is None:
        return mpi or srun
    # MPI starts a helper by srun on each node, so there may be fewer tasks, not more.
    if srun.size > mpi.size:
        raise ValueError(
            f"srun says {srun}, {mpi.launcher} says {mpi}: start one {mpi.launcher}, not one in "
            "each task"
        )
    return mpi


def _mpirun(environment: Mapping[str, str]) -> Announcement | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    return _place(environment, "mpirun", [f"OMPI_COMM_WORLD_{x}" for x in _OPENMPI])


def _mpiexec(environment: Mapping[str, str], srun: Announcement | None) -> Announcement | None:
    if "PMI_RANK" not in environment:
        return None
    index, size = (integer(environment, name) for name in ("PMI_RANK", "PMI_SIZE"))
    if srun is not None and (srun.index, srun.size) == (index, size):
        # srun itself speaks PMI to its tasks.
        return None
    local = next((name for name in _PMI_LOCAL if name in environment), None)
    if local is None and size > 1:
        raise ValueError(
            f"PMI_RANK={index}, PMI_SIZE={size}, but none of {', '.join(_PMI_LOCAL)} is set, which "
            "says the task's number on its node: set MPI_LOCALRANKID, or start by torchrun, "
            "deepspeed or srun"
        )
    local_rank = 0 if local is None else integer(environment, local)
    return Announcement("mpiexec", index, size, local_rank, "PMI_RANK", "PMI_SIZE")


def _srun(environment: Mapping[str, str]) -> Announcement | None:
    """Return the task of srun. None in a batch script, which has SLURM_PROCID but is no task."""
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NODELIST" not in environment:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    return _place(environment, "srun", ["SLURM_PROCID", size, "SLURM_LOCALID"])


def _place(environment: Mapping[str, str], launcher: str, names: Sequence[str]) -> Announcement:
    index, size, local_rank = (integer(environment, name) for name in names)
    return Announcement(launcher, index, size, local_rank, names[0], names[1])


def integer(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    """Return the whole number that a variable holds. ValueError if it holds none."""
    text = environment.get(name, default)
    if text is None or not re.fullmatch(r"[0-9]+", text):
        raise ValueError(f"{name}={text}: must be a whole number, as launchers set it")
    return int(text)
