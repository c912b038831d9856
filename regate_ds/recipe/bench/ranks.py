"""The ranks of a benchmark: this process, those of a launcher, or processes of its own."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from regate_ds.job.deepspeed_launcher import free_port
from regate_ds.job.process import start_process
from regate_ds.recipe.bench.arms import StepArm, arms_of
from regate_ds.recipe.bench.case import StepCase
from regate_ds.recipe.bench.host import StepHost
from regate_ds.recipe.bench.timing import Measured, measure

FoundByRank = list[dict[str, Measured]]
"""What each rank found of each arm."""


def run_ranks_of(case: StepCase) -> tuple[FoundByRank, dict[str, Any]]:
    """Run the case on as many ranks as it has; return what they found, and the machine.

    ValueError if a launcher has started another number of ranks.
    """
    arms = arms_of(case)
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else None
    if started is not None and started != case.world_size:
        raise ValueError(
            f"the case has {case.world_size} ranks, but the launcher started {started}; start as "
            "many, or none: the benchmark then starts its own"
        )
    if started is not None or case.world_size == 1:
        return bench_rank(case, arms), machine_of()
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    mp.start_processes(
        _spawned, args=(case, address, results), nprocs=case.world_size, start_method="spawn"
    )
    return results.get()


def _spawned(rank: int, case: StepCase, address: dict[str, str], results: Any) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.world_size}
    os.environ.update({**address, **{k: str(v) for k, v in world.items()}})
    found = bench_rank(case, arms_of(case))
    if rank == 0:
        results.put((found, machine_of()))


def bench_rank(case: StepCase, arms: dict[str, StepArm]) -> FoundByRank:
    """Run this rank's part; return what every rank found. Collective over the case's ranks."""
    torch.set_num_threads(case.threads)
    needs_groups = case.world_size > 1 or case.host != "huggingface" or case.zero_stage is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if needs_groups:
        device = start_process().device
    # DeepSpeed prints what it does.
    with contextlib.redirect_stdout(sys.stderr):
        own = measure(case, _host(case, arms, device), arms, device)
    if not needs_groups:
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    dist.destroy_process_group()
    return found


def _host(case: StepCase, arms: dict[str, StepArm], device: torch.device) -> StepHost:
    if case.host == "deepspeed_pipeline":
        from regate_ds.recipe.bench.pipeline import PipelineHost

        return PipelineHost(case, arms, device)
    if case.host == "megatron":
        from regate_ds.recipe.bench.megatron import MegatronHost

        return MegatronHost(case, arms, device)
    from regate_ds.recipe.bench.huggingface import HuggingFaceHost

    return HuggingFaceHost(case, arms, device)


def machine_of() -> dict[str, Any]:
    is_cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if is_cuda else platform.machine()
    return {"device": name, "torch": torch.__version__, "clock": "events" if is_cuda else "CPU"}
