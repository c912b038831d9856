"""Find this process's rank in the job from what its launcher announced. Imports no framework.

RANK ...                    set by torchrun and deepspeed, and read by the rest of the package
SLURM_PROCID ...            a task of srun
OMPI_COMM_WORLD_RANK ...    a task of an MPI or of flux: see tasks.py

torchrun and deepspeed may run inside such a task, one on each node. Two announcements that
contradict each other are an error.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from regate_ds.job.tasks import Announcement, integer, refuse_remains, task_of

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_ON_NODE = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "PMI_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
"""Names under which launchers announce the number of ranks on this node."""

_FIRST_PORT, _NUM_PORTS = 10_000, 20_000
"""Range of a SLURM job's port; it lies below the ports that Linux gives out by itself."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of the job."""

    launcher: str
    """Source of the announcement: "deepspeed", "torchrun", a launcher of tasks such as "srun",
    "environment" or "none"."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: str = ""
    """Name of the node, the same on all of its ranks and on no others."""

    address: str = "127.0.0.1"
    port: int | None = None
    """Port where the first rank listens; None for a single process, which may take any."""


def discover(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Find this process's place. ValueError if announcements are incomplete or contradictory."""
    outer = task_of(environment)
    if "RANK" in environment:
        return _announced(environment, outer)
    if outer is None or outer.size == 1:
        if outer is None:
            _refuse_several(environment)
        return Ranks("none", node=socket.gethostname())
    return Ranks(
        outer.launcher,
        outer.index,
        outer.size,
        outer.local_rank,
        _node(environment),
        _address(environment, outer),
        _port(environment, outer),
    )


def announce(environment: MutableMapping[str, str] = os.environ) -> Ranks:
    """Discover, and for a task of srun or of MPI also set RANK and its siblings."""
    ranks = discover(environment)
    if "RANK" not in environment and ranks.world_size > 1:
        values = (ranks.rank, ranks.world_size, ranks.local_rank, ranks.address, ranks.port)
        environment.update(zip(RANK_NAMES, map(str, values)))
    return ranks


def ranks_on_node(ranks: Ranks) -> int:
    """Return the number of ranks on this node as its launcher announced it, or 1."""
    for name in _ON_NODE:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
    return int(tasks) if ranks.launcher == "srun" and tasks.isdigit() else 1


def _announced(environment: Mapping[str, str], outer: Announcement | None) -> Ranks:
    """Read RANK and its siblings, which torchrun, deepspeed or the user's own script has set."""
    rank, world_size = integer(environment, "RANK"), integer(environment, "WORLD_SIZE", "1")
    missing = [name for name in RANK_NAMES if name not in environment and name != "RANK"]
    if world_size == 1 or outer is not None:
        missing = [name for name in missing if name != "LOCAL_RANK"]
    if missing:
        raise ValueError(
            f"RANK={rank}, but {', '.join(missing)} not set: start by deepspeed, torchrun, srun or "
            "launch/, or unset RANK to run one process"
        )
    if rank >= world_size:
        raise ValueError(f"RANK={rank}, but WORLD_SIZE={world_size}: ranks count from 0; lower it")
    agent = _agent(environment)
    _require_agreement(environment, agent, outer)
    local_rank = integer(environment, "LOCAL_RANK", str(outer.local_rank if outer else 0))
    return Ranks(
        agent.launcher if agent else "environment",
        rank,
        world_size,
        local_rank,
        str(agent.index) if agent else _node(environment),
        environment["MASTER_ADDR"],
        _open_port(environment),
    )


def _require_agreement(
    environment: Mapping[str, str], agent: Announcement | None, outer: Announcement | None
) -> None:
    if outer is None:
        return
    if agent is not None:
        # torchrun and deepspeed number nodes in the order in which they join: compare the count.
        if agent.size == outer.size or outer.size == 1:
            return
        raise ValueError(
            f"{agent.launcher} says {agent}, {outer.launcher} says {outer}: start one "
            f"{agent.launcher} on each node, and tell it of all nodes"
        )
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if outer.size > 1 and (rank, world_size) != (outer.index, outer.size):
        raise ValueError(
            f"RANK={rank}, WORLD_SIZE={world_size}, but {outer.launcher} says {outer}: unset RANK, "
            f"or start without {outer.launcher}"
        )


def _agent(environment: Mapping[str, str]) -> Announcement | None:
    """Return the announcement of torchrun or deepspeed: the number of this node among the nodes."""
    for launcher, index, size in (
        ("torchrun", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        ("deepspeed", "CROSS_RANK", "CROSS_SIZE"),
    ):
        if index in environment and size in environment:
            number, count = integer(environment, index), integer(environment, size)
            return Announcement(launcher, number, count, 0, index, size)
    return None


def _refuse_several(environment: Mapping[str, str]) -> None:
    """Refuse to run alone where something tells of several tasks, as in a batch script."""
    if (tasks := integer(environment, "SLURM_NTASKS", "1")) != 1:
        raise ValueError(
            f"SLURM_NTASKS={tasks}, but this process is no task of srun: start by srun, deepspeed, "
            "torchrun or launch/, or set SLURM_NTASKS=1 to run one process"
        )
    refuse_remains(environment)


def _node(environment: Mapping[str, str]) -> str:
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def _address(environment: Mapping[str, str], outer: Announcement) -> str:
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ValueError(
            f"{outer.launcher} says {outer}, but MASTER_ADDR is not set: give all ranks the first "
            f"rank's node, as by {_given(outer, 'MASTER_ADDR=NODE', 'MASTER_PORT=29500')}"
        )
    return first_host(nodes)


def _given(outer: Announcement, *values: str) -> str:
    """Return the command by which a launcher gives its tasks these variables."""
    if outer.launcher == "mpiexec":
        values = tuple(value.replace("=", " ") for value in values)
    option = {"mpiexec": "-genv", "jsrun": "-E", "flux run": "--env"}.get(outer.launcher, "-x")
    return " ".join([outer.launcher, *(f"{option} {value}" for value in values)])


def first_host(nodes: str) -> str:
    """Return the first node of a list as SLURM writes it: "gpu03" for "gpu[03-07,12],login1"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    if first is None:
        raise ValueError(f"{nodes!r} is no list of nodes: set MASTER_ADDR to the first rank's node")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def _port(environment: Mapping[str, str], outer: Announcement) -> int:
    if "MASTER_PORT" in environment:
        return _open_port(environment)
    if "SLURM_JOB_ID" not in environment:
        raise ValueError(
            f"{outer.launcher} says {outer}, but MASTER_PORT is not set: give all ranks one port, "
            f"as by {_given(outer, 'MASTER_PORT=29500')}"
        )
    return job_port(integer(environment, "SLURM_JOB_ID"))


def _open_port(environment: Mapping[str, str]) -> int:
    port = integer(environment, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT={port}: must be from 1 to 65535; give all ranks a free one")
    return port


def job_port(job: int) -> int:
    """Return a SLURM job's port, as launch/ does; steps that run at once must set MASTER_PORT."""
    return _FIRST_PORT + job % _NUM_PORTS


def is_first_rank() -> bool:
    """Return whether the launcher announced rank 0 (or none), without any process group."""
    return os.environ.get("RANK", "0") == "0"
