"""Read which task of srun or of MPI this process is. Imports no framework.

SLURM_PROCID ...        a task of srun
OMPI_COMM_WORLD_RANK    a task of Open MPI's mpirun
JSM_NAMESPACE_RANK      a task of jsrun (LSF)
PMI_RANK ...            a task of mpiexec, of MPICH and what comes from it (Intel MPI, PALS)
FLUX_TASK_RANK          a task of flux run, which speaks PMI as well unless told not to
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_OF_MPI = (
    (
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", ("JSM_NAMESPACE_LOCAL_RANK",)),
    (
        "mpiexec",
        "PMI_RANK",
        "PMI_SIZE",
        (
            "MPI_LOCALRANKID",
            "PMI_LOCAL_RANK",
            "PALS_LOCAL_RANKID",
            "MV2_COMM_WORLD_LOCAL_RANK",
            "FLUX_TASK_LOCAL_ID",
        ),
    ),
    (
        "mpiexec",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
    ),
    ("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_TASK_LOCAL_ID",)),
)
"""For each way in which tasks are told their places: who starts them, the names of a task's number
and of the number of tasks, and those under which its number on its node may be found."""

_TELLING = {
    **dict.fromkeys(("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE"), 0),
    **dict.fromkeys(("LOCAL_RANK", "GROUP_RANK", "CROSS_RANK", "SLURM_PROCID", "SLURM_LOCALID"), 1),
    **{name: 1 for _, index, _, local in _OF_MPI for name in (index, *local)},
    **dict.fromkeys(("WORLD_SIZE", "GROUP_WORLD_SIZE", "CROSS_SIZE", "SLURM_STEP_NUM_TASKS"), 2),
    **dict.fromkeys(("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), 2),
    **{size: 2 for _, _, size, _ in _OF_MPI},
}
"""Variables that tell of several tasks, each from this value on."""


@dataclass(frozen=True)
class Announcement:
    """One announcement: number ``index`` of ``size``, read from the variables of these names."""

    launcher: str
    index: int
    size: int
    local_rank: int
    index_name: str
    size_name: str

    def __post_init__(self) -> None:
        if self.index >= self.size:
            raise ValueError(
                f"{self}: {self.launcher} counts from 0, so that no process has this number; unset "
                f"{self.index_name}, or correct {self.size_name}"
            )

    def __str__(self) -> str:
        return f"{self.index_name}={self.index}, {self.size_name}={self.size}"


def task_of(environment: Mapping[str, str]) -> Announcement | None:
    """Return the task of MPI or srun that this process is, or runs in; None if there is none."""
    srun = _srun(environment)
    mpi = _mpi(environment, srun)
    if srun is None or mpi is None:
        return mpi or srun
    # MPI starts a helper by srun on each node, so there may be fewer tasks, not more.
    if srun.size > mpi.size:
        raise ValueError(
            f"srun says {srun}, {mpi.launcher} says {mpi}: start one {mpi.launcher}, not one in "
            "each task"
        )
    return mpi


def refuse_remains(environment: Mapping[str, str]) -> None:
    """Refuse, by ValueError, variables that tell of several tasks, but not which of them this is.

    A container, sudo or ssh may have dropped the others. Only for a process that is no task.
    """
    for name, least in _TELLING.items():
        if environment.get(name) and integer(environment, name) >= least:
            raise ValueError(
                f"{name}={environment[name]} tells of several tasks, but no variable says which of "
                "them this is: start by srun, mpirun, deepspeed, torchrun or launch/, and let a "
                f"container pass all of their variables on, or unset {name} to run one process"
            )


def _mpi(environment: Mapping[str, str], srun: Announcement | None) -> Announcement | None:
    for launcher, index_name, size_name, local_names in _OF_MPI:
        if index_name not in environment:
            continue
        index, size = (integer(environment, name) for name in (index_name, size_name))
        if index_name == "PMI_RANK" and srun and (srun.index, srun.size) == (index, size):
            # srun itself speaks PMI to its tasks.
            return None
        local = next((name for name in local_names if name in environment), None)
        if local is None and size > 1:
            raise ValueError(
                f"{index_name}={index}, {size_name}={size}, but {_none_of(local_names)} set, which "
                f"says the task's number on its node: set {local_names[0]}, or start by torchrun, "
                "deepspeed or srun"
            )
        local_rank = 0 if local is None else integer(environment, local)
        return Announcement(launcher, index, size, local_rank, index_name, size_name)
    return None


def _none_of(names: Sequence[str]) -> str:
    return f"{names[0]} is not" if len(names) == 1 else f"none of {', '.join(names)} is"


def _srun(environment: Mapping[str, str]) -> Announcement | None:
    """Return the task of srun. None in a batch script, which has SLURM_PROCID but is no task."""
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NODELIST" not in environment:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    index, count, local_rank = (
        integer(environment, name) for name in ("SLURM_PROCID", size, "SLURM_LOCALID")
    )
    return Announcement("srun", index, count, local_rank, "SLURM_PROCID", size)


def integer(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    """Return the whole number that a variable holds. ValueError if it holds none."""
    text = environment.get(name, default)
    if text is None or not re.fullmatch(r"[0-9]{1,18}", text):
        shown = None if text is None else " ".join(text.split())
        raise ValueError(f"{name}={shown}: must be a whole number, as launchers set it; unset it")
    return int(text)
