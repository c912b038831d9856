"""A real SLURM of two virtual nodes on this machine, on ports and in a folder of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from regate_ds.job.deepspeed_launcher import free_port
from tests.cluster.jobs import wait_for
from tests.cluster.programs import started

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

_CONFIG = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
BatchStartTimeout=30
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_n1} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_n2} CPUs=4 RealMemory=4000
PartitionName=low Nodes=n1,n2 PriorityTier=1 GraceTime=120 Default=YES
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""


def lacks() -> str:
    """Why no cluster can be started here; "" if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd and munged need root"


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and its siblings talk to the cluster."""
    config = _write_config(folder)
    environment = {**os.environ, "SLURM_CONF": str(config)}
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    for option in ("socket", "pid-file", "log-file", "seed-file"):
        munged.append(f"--{option}={folder}/munge.{option.split('-')[0]}")
    with ExitStack() as stack:
        log = stack.enter_context((folder / "daemons.log").open("w"))
        stack.enter_context(started(munged, environment, log))
        wait_for(lambda: (folder / "munge.socket").exists(), "munged", 60)
        stack.enter_context(started(["slurmctld", "-D"], environment, log))
        for node in ("n1", "n2"):
            stack.enter_context(started(["slurmd", "-D", "-N", node], environment, log))
        wait_for(lambda: _idle(environment) == 2, "two idle nodes", 60)
        yield environment


def _write_config(folder: Path) -> Path:
    for name in ("state", "spool/n1", "spool/n2"):
        (folder / name).mkdir(parents=True)
    ports = {name: free_port() for name in ("controller_port", "port_n1", "port_n2")}
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(folder=folder, host=os.uname().nodename, **ports))
    return config


def _idle(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return asked.stdout.split().count("idle")
