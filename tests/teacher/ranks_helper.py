"""A rank of a small teacher's job, as the command runs it; quick to start, because it is forked
from a server that has imported all it needs."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import reduction
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from regate_ds.job import supervise as job
from regate_ds.job.deepspeed_launcher import free_port
from regate_ds.job.errors import USER_ERRORS, print_error
from regate_ds.job.process import Process
from regate_ds.teacher.precompute import precompute
from regate_ds.teacher.scoring import ScoredSample
from tests.teacher.plain_job_helper import make_plain_job, score

GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Run:
    """How the ranks' teacher behaves."""

    store: Path
    num_samples: int = 40

    seconds_per_batch: float = 0.0
    stuck_rank: int | None = None
    """Sleeps in its first batch, as one that waits for a peer in a collective does."""

    fails_after: int | None = None
    """Batches of each rank before its teacher fails."""

    other_rank: int | None = None
    """Has another teacher than the others."""

    ranks_per_replica: int = 1
    in_step: bool = False

    largest_file: int | None = None
    """Bytes that a file may have: a disk that is full beyond them."""

    counts: Path | None = None
    """Folder in which each rank writes down how many batches it has scored."""


class Stderr:
    """A file that a rank inherits."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __reduce__(self):
        return _inherited, (reduction.DupFd(self._handle),)


def _inherited(handle):
    return handle


@dataclass
class Ranks:
    """Processes of one job, without a launcher that would end them."""

    stderr: int
    """A pipe that all of them write to: it has room on any disk."""

    text: str = ""
    """What was read of it."""

    processes: list[ForkServerProcess] = field(default_factory=list)

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes, once all have ended; TimeoutError if they do not."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if alive:
            raise TimeoutError(f"ranks {alive} run on after {seconds} s:\n{self.said()}")
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """All of it so far."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.stderr, 1 << 20):
                self.text += chunk.decode(errors="replace")
        return self.text

    def errors(self) -> list[str]:
        """The lines about errors."""
        lines = self.said().replace("\r", "\n").split("\n")
        return [line for line in lines if line.startswith("regate ")]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def start(run: Run, size: int) -> Ranks:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    read, write = os.pipe()
    os.set_blocking(read, False)
    ranks, port = Ranks(read), free_port()
    for rank in range(size):
        process = context.Process(
            target=_main, args=(run, rank, size, port, Stderr(write)), daemon=True
        )
        process.start()
        ranks.processes.append(process)
    os.close(write)
    return ranks


def _main(run: Run, rank: int, size: int, port: int, stderr: Any) -> None:
    torch.set_num_threads(1)
    os.dup2(stderr.detach(), 2)
    job.GRACE_SECONDS = GRACE_SECONDS
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    if run.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.largest_file, run.largest_file))
    try:
        with job.watched(Process(rank, size, torch.device("cpu")), "teacher"):
            teacher = _Teacher(run, rank)
            plan: dict[str, Any] = {
                "ranks_per_replica": run.ranks_per_replica,
                "in_step": run.in_step,
            }
            if rank == run.other_rank:
                plan["teacher_id"] = "other"
            made = make_plain_job(run.store, run.num_samples, score=teacher, **plan)
            precompute(made, dist.group.WORLD)
            dist.barrier()
        if run.counts is not None:
            (run.counts / str(rank)).write_text(str(teacher.num_batches))
    except USER_ERRORS as error:
        print_error("teacher", error)
        sys.exit(1)
    dist.destroy_process_group()


class _Teacher:
    def __init__(self, run: Run, rank: int) -> None:
        self.num_batches = 0
        self._run, self._rank = run, rank

    def __call__(self, samples: Sequence[ScoredSample]) -> torch.Tensor:
        if self._rank == self._run.stuck_rank:
            # No exception in this thread wakes it.
            ctypes.CDLL(None).sleep(3600)
        if self.num_batches == self._run.fails_after:
            raise RuntimeError("the device is lost")
        self.num_batches += 1
        time.sleep(self._run.seconds_per_batch)
        return score(samples)
