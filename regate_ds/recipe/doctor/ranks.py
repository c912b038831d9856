"""Checks that the ranks of a job make together: their nodes, the time of a sum, a shared folder."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from regate_ds.job.process import Process
from regate_ds.recipe.doctor.check import Check

_MEBIBYTES = 16
_REPEATS = 5

SECONDS_TO_SEE = 20.0
"""Time for a file to appear on other nodes, as network file systems may show it late."""


def examine_together(
    process: Process, node: str, own: Sequence[Check], axes: dict[str, int], folder: Path
) -> list[Check]:
    """Merge the ranks' own checks, and add those that need all ranks. Collective.

    The result is the same on all ranks. axes: sizes of the tensor, context and pipeline groups, as
    Megatron-core lays them out.
    """
    nodes: list[str] = _gathered(node, process)
    checks = _merged(_gathered(list(own), process))
    text = f"{process.world_size} on {len(set(nodes))} nodes"
    checks.append(Check("ranks", text, True, True))
    for name, groups in groups_of(nodes, axes).items():
        checks.append(_timed(name, groups, process))
    checks.append(_shared(folder, process))
    return checks


def groups_of(nodes: Sequence[str], axes: dict[str, int]) -> dict[str, list[list[int]]]:
    """Return the groups of ranks that sum together: the world, each node, and each axis above 1.

    ValueError if the axes do not divide the ranks.
    """
    count = len(nodes)
    groups = {
        "world": [list(range(count))],
        "node": [[r for r in range(count) if nodes[r] == node] for node in dict.fromkeys(nodes)],
    }
    sizes = {"tensor": 1, "context": 1, "pipeline": 1} | axes
    together = sizes["tensor"] * sizes["context"] * sizes["pipeline"]
    if count % together:
        text = ", ".join(f"parallel.{name}={size}" for name, size in axes.items())
        raise ValueError(
            f"{text}: {count} ranks are no multiple of {together}; start a multiple of {together} "
            "ranks, or lower the sizes"
        )
    # The axes from the innermost to the outermost, in Megatron-core's order.
    order = ("tensor", "context", "data", "pipeline")
    sizes["data"] = count // together
    stride = 1
    for name in order:
        size = sizes[name]
        if size > 1 and together > 1:
            starts = [r for r in range(count) if r // stride % size == 0]
            groups[name] = [[start + i * stride for i in range(size)] for start in starts]
        stride *= size
    return groups


def _timed(name: str, groups: list[list[int]], process: Process) -> Check:
    """Time a sum over this rank's group, while all other groups of the axis sum too."""
    own_members, own_group = groups[0], None
    for members in groups:
        group = dist.new_group(members)
        if process.rank in members:
            own_members, own_group = members, group
    seconds, is_right = [], True
    for _ in range(_REPEATS + 1):
        values = torch.full((_MEBIBYTES * 2**18,), float(process.rank), device=process.device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values, group=own_group)
        # float() waits for the device.
        is_right = is_right and float(values[-1]) == sum(own_members)
        seconds.append(time.perf_counter() - start)
    slowest = max(_gathered(statistics.median(seconds[1:]), process))
    wrong = [rank for rank, is_fine in enumerate(_gathered(is_right, process)) if not is_fine]
    text = f"{len(groups)} x {len(own_members)} ranks: {_MEBIBYTES} MiB in {slowest * 1e3:.1f} ms"
    advice = f"the sum is wrong on ranks {_listed(wrong)}: test their network" if wrong else ""
    return Check(f"sum over {name}", text, True, not wrong, advice)


def _shared(folder: Path, process: Process) -> Check:
    """Write a file on every rank, and look for the files of all others."""
    token = _gathered(secrets.token_hex(8), process)[0]
    paths = [folder / f".regate-doctor-{token}-{rank}" for rank in range(process.world_size)]
    problem = ""
    try:
        paths[process.rank].write_text(f"{token} {process.rank}")
        missing = _missing(paths, token)
        if missing:
            problem = f"does not see what ranks {_listed(missing)} wrote"
    except OSError as error:
        problem = str(error)
    problems = _gathered(problem, process)
    paths[process.rank].unlink(missing_ok=True)
    dist.barrier()
    bad = [rank for rank, text in enumerate(problems) if text]
    if not bad:
        return Check("shared folder", f"{folder}: all ranks see all", True, True)
    advice = f"rank {bad[0]} {problems[bad[0]]}: runs need a folder that all nodes share"
    return Check("shared folder", f"{folder}", True, False, advice)


def _missing(paths: list[Path], token: str) -> list[int]:
    """Return the ranks whose file has not appeared in time, or holds something else."""
    end = time.monotonic() + SECONDS_TO_SEE
    while True:
        missing = [rank for rank, path in enumerate(paths) if _text(path) != f"{token} {rank}"]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.1)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _merged(by_rank: list[list[Check]]) -> list[Check]:
    """Return the first rank's checks, replaced where another's is worse or has another version."""
    return [_merged_one([checks[i] for checks in by_rank]) for i in range(len(by_rank[0]))]


def _merged_one(found: list[Check]) -> Check:
    first = found[0]
    if not first.is_fine:
        return first
    for rank, other in enumerate(found):
        if not other.is_fine:
            advice = f"on rank {rank}: {other.advice or other.found}"
            return Check(first.name, other.found, first.is_required, False, advice)
        if first.is_version and other.found != first.found:
            advice = f"{other.found} on rank {rank}: install one version everywhere"
            return Check(first.name, first.found, first.is_required, False, advice)
    return first


def _gathered(value: Any, process: Process) -> list[Any]:
    values: list[Any] = [None] * process.world_size
    dist.all_gather_object(values, value)
    return values


def _listed(ranks: Sequence[int]) -> str:
    text = ", ".join(map(str, ranks[:8]))
    return text if len(ranks) <= 8 else f"{text} and {len(ranks) - 8} more"
