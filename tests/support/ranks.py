"""Run a plain function in several processes that talk over gloo."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 300

PRELOADED = ["deepspeed", "transformers.models.llava.modeling_llava", "regate_ds.recipe.trainer"]
"""What ranks need not import each: eight seconds a process."""

Failures = dict[str, list[str]]
"""Messages of the ranks by the name of a case; none where it passed."""


def run_ranks(
    check: Callable[..., None], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS
) -> None:
    """Call ``check(rank, *args)`` in ``world_size`` processes, in which WORLD is a gloo group.

    ``check`` is an importable function. The first rank that fails fails the caller with its
    traceback; after ``timeout`` seconds the ranks still at work are killed and named.
    """
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    context = mp.start_processes(
        _run_rank,
        args=(world_size, _free_port(), check, args),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                alive = [rank for rank, p in enumerate(context.processes) if p.is_alive()]
                raise TimeoutError(f"ranks {alive} did not finish {check.__name__} in {timeout} s")
    finally:
        _kill(context.processes)


def failures_of(check: Callable[..., None], world_size: int, folder: Path) -> Failures:
    """Run ``check(rank, folder)``, which writes what failed of many cases (``run_named``)."""
    run_ranks(check, world_size, str(folder))
    found: Failures = {}
    for path in sorted(folder.glob("rank*.json")):
        for name, message in json.loads(path.read_text()).items():
            found.setdefault(name, []).append(f"{path.stem}: {message}")
    return found


def _run_rank(
    rank: int, world_size: int, port: int, check: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    check(rank, *args)
    # Not on failure: a rank that has failed must end, not wait for the others.
    dist.barrier()
    dist.destroy_process_group()


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
