"""Jobs on a real SLURM of two virtual nodes; `make test-slurm` runs it."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.jobs import (
    FAILURE,
    ROOT,
    STEPS,
    passed,
    prepare,
    rows,
    summary,
    training,
    wait_for,
)
from tests.cluster.slurm_cluster import lacks, slurm_cluster

LAUNCHERS = ("torchrun", "deepspeed", "srun")


@dataclass(frozen=True)
class Cluster:
    """Submits jobs of two nodes, from a folder that is not the repository's."""

    folder: Path
    environment: dict[str, str]

    def submit(self, *command: str, launcher: str = "torchrun", **variables: str) -> str:
        """Number of the job."""
        sbatch = ["sbatch", "--parsable", "--nodes=2", "--output=job-%j.log"]
        script = [str(ROOT / "launch" / "slurm.sh"), *command]
        environment = {**self.environment, "LAUNCHER": launcher, **variables}
        return self.ask([*sbatch, *script], environment).strip()

    def ask(self, command: list[str], environment: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            env=environment or self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def field(self, job: str, name: str) -> str:
        text = self.ask(["scontrol", "--oneliner", "show", "job", job])
        found = re.search(rf"\b{name}=(\S+)", text)
        assert found is not None, f"no {name} in {text}"
        return found.group(1)

    def end(self, job: str) -> str:
        """Wait for the end of a job: its exit code, as sbatch has it, "code:signal"."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        wait_for(lambda: self.field(job, "JobState") in over, f"end of job {job}")
        return self.field(job, "ExitCode")

    def log(self, job: str) -> str:
        return (self.folder / f"job-{job}.log").read_text()

    def run(self, *command: str, launcher: str = "torchrun", **variables: str) -> tuple[str, str]:
        """Number and exit code of a job that is waited for."""
        job = self.submit(*command, launcher=launcher, **variables)
        return job, self.end(job)


def check_teacher(cluster: Cluster) -> None:
    job, code = cluster.run("teacher", str(cluster.folder / "run.yaml"), launcher="srun")
    assert code == "0:0", cluster.log(job)
    assert (cluster.folder / "store" / "manifest.json").is_file()


def check_doctor(cluster: Cluster) -> None:
    job, code = cluster.run("doctor", str(cluster.folder / "run.yaml"), launcher="srun")
    said = (cluster.folder / "logs" / job / "rank0.log").read_text()
    assert code == "0:0", said
    assert "2 on 2 nodes" in said
    lines = ("launcher", "ranks", "sum over", "shared", "memory", "disk")
    print("".join(f"    {x}\n" for x in said.splitlines() if x[9:].startswith(lines)), end="")


def check_training(cluster: Cluster, launcher: str) -> None:
    job, code = cluster.run(*training(cluster.folder, launcher), launcher=launcher)
    assert code == "0:0", cluster.log(job)
    assert summary(cluster.folder, launcher)["world_size"] == 2
    assert f"job {job}, start 1, on n[1-2], 1 ranks each, by {launcher}" in cluster.log(job)
    logs = [path for path in (cluster.folder / "logs" / job).rglob("*") if path.is_file()]
    assert sum(f"{launcher}: 4 steps" in path.read_text() for path in logs) == 1, logs
    assert rows(cluster.folder, launcher) == rows(cluster.folder, LAUNCHERS[0])


def check_failure(cluster: Cluster, launcher: str) -> None:
    """A rank that fails while the other one waits for it ends the job with its code."""
    command = training(cluster.folder, f"failed-{launcher}")
    job, code = cluster.run(*command, launcher=launcher, FAILING_RANK="1")
    assert code == f"{FAILURE}:0", (code, cluster.log(job))
    assert cluster.field(job, "Restarts") == "0"


def check_requeue(cluster: Cluster, launcher: str) -> None:
    """The signal that comes before the time limit: the run goes on as if it had never stopped."""
    out = f"requeued-{launcher}"
    job = cluster.submit(*training(cluster.folder, out, STEPS), launcher=launcher)
    wait_for(lambda: len(rows(cluster.folder, out)) > 3, f"step 3 of {out}")
    cluster.ask(["scancel", "--batch", "--signal=USR1", job])
    assert_resumed(cluster, job, out)


def check_preemption(cluster: Cluster, launcher: str) -> None:
    """A job of a partition that comes first takes the nodes."""
    out = f"preempted-{launcher}"
    job = cluster.submit(*training(cluster.folder, out, STEPS), launcher=launcher)
    wait_for(lambda: len(rows(cluster.folder, out)) > 3, f"step 3 of {out}")
    first = ["sbatch", "--parsable", "--nodes=2", "--partition=high", "--exclusive"]
    other = cluster.ask([*first, "--output=/dev/null", "--wrap=sleep 1"]).strip()
    assert cluster.end(other) == "0:0"
    assert_resumed(cluster, job, out)


def check_cancelled(cluster: Cluster) -> None:
    """Who cancels a job keeps its last step; the same command, submitted again, goes on."""
    command = training(cluster.folder, "cancelled", STEPS)
    job = cluster.submit(*command, launcher="srun")
    wait_for(lambda: len(rows(cluster.folder, "cancelled")) > 3, "step 3 of cancelled")
    cluster.ask(["scancel", job])
    cluster.end(job)
    latest = cluster.folder / "cancelled" / "checkpoints" / "latest"
    wait_for(latest.is_file, "checkpoint of a cancelled job", 60)
    assert cluster.field(job, "JobState") == "CANCELLED"
    job, code = cluster.run(*command, launcher="srun")
    assert code == "0:0", cluster.log(job)
    assert rows(cluster.folder, "cancelled") == rows(cluster.folder, "whole")


def assert_resumed(cluster: Cluster, job: str, out: str) -> None:
    assert cluster.end(job) == "0:0", cluster.log(job)
    log = cluster.log(job)
    assert cluster.field(job, "Restarts") == "1", log
    assert f"job {job}, start 2," in log
    saved = re.findall(r"after (\d+) of", "".join(texts(cluster, job)))
    assert saved, log
    assert 3 < int(saved[0]) < STEPS
    assert rows(cluster.folder, out) == rows(cluster.folder, "whole")
    print(f"    {out}: saved after step {saved[0]} of {STEPS}, then resumed")


def texts(cluster: Cluster, job: str) -> list[str]:
    logs = (cluster.folder / "logs" / job).rglob("*")
    return [cluster.log(job), *(path.read_text() for path in logs if path.is_file())]


def check_whole(cluster: Cluster) -> None:
    """The run that nobody interrupts."""
    job, code = cluster.run(*training(cluster.folder, "whole", STEPS))
    assert code == "0:0", cluster.log(job)
    assert len(rows(cluster.folder, "whole")) == STEPS


def check_all(cluster: Cluster) -> None:
    checks: list[tuple[str, Callable[..., None], tuple[str, ...]]] = [
        ("teacher job on two nodes", check_teacher, ()),
        ("doctor on two nodes", check_doctor, ()),
        *(("training by", check_training, (launcher,)) for launcher in LAUNCHERS),
        *(("exit code of a rank by", check_failure, (launcher,)) for launcher in LAUNCHERS),
        (f"training of {STEPS} steps", check_whole, ()),
        *(("requeue by", check_requeue, (launcher,)) for launcher in ("torchrun", "deepspeed")),
        *(("pre-emption by", check_preemption, (launcher,)) for launcher in ("torchrun", "srun")),
        ("scancel, submitted again", check_cancelled, ()),
    ]
    for what, check, arguments in checks:
        since = time.monotonic()
        check(cluster, *arguments)
        passed(" ".join([what, *arguments]), since)


def main() -> int:
    reason = lacks()
    if reason:
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        jobs = prepare(folder)
        with slurm_cluster(folder / "cluster") as environment:
            check_all(Cluster(folder, {**jobs, "SLURM_CONF": environment["SLURM_CONF"]}))
    print("test-slurm: all passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
