"""Time the arms in turns, then measure each once: bytes, transfers and waits for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.recipe.bench.arms import DENSE, HOST, StepArm
from regate_ds.recipe.bench.case import StepCase
from regate_ds.recipe.bench.host import StepHost, StepParts
from regate_ds.recipe.bench.measures import DeviceWaits, LiveBytes, SavedBytes, Traffic


@dataclass
class Measured:
    """What one rank found of one arm."""

    seconds: list[float] = field(default_factory=list)
    """Of each turn."""

    overhead: list[float] = field(default_factory=list)
    """CPU seconds of planning and stores in each turn; empty where the host's call does that."""

    flops: float = 0.0
    flops_causal: float = 0.0
    saved_bytes: int | None = None
    """None where layers are checkpointed."""

    peak_bytes: int = 0
    sent_bytes: int = 0
    collective_bytes: int = 0
    waits: int = 0
    """Waits for the device in the passes."""

    waits_at_end: int = 0
    """Those in what follows them, which brings the losses to the host."""

    share_of_rows: float = 0.0
    """Layer-weighted share of the positions that passed the layers."""


class Clock:
    """Seconds of this process on a CPU, of the device between two events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    @contextmanager
    def into(self, seconds: list[float]) -> Iterator[None]:
        """Append what the block took."""
        if not self._cuda:
            begin = time.process_time()
            yield
            seconds.append(time.process_time() - begin)
            return
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)


def measure(
    case: StepCase, host: StepHost, arms: dict[str, StepArm], device: torch.device
) -> dict[str, Measured]:
    """Run every arm in turns; return what this rank found of each."""
    found = {name: Measured() for name in arms}
    clock = Clock(device)
    for turn in range(case.rounds + 1):
        for name in arms:
            with host.ready(name) as parts:
                # The first turn warms up.
                timed = found[name] if turn else Measured()
                _timed_step(parts, clock, timed, is_baseline=name in (HOST, DENSE))
    for name, arm in arms.items():
        _measure_once(case, host, arm, name, found[name], device)
    return found


def _timed_step(parts: StepParts, clock: Clock, into: Measured, *, is_baseline: bool) -> None:
    """Time one step; a baseline's does not count what it has no use for."""
    passes: list[float] = []
    begin = time.process_time()
    plan = parts.plan()
    planned = time.process_time() - begin
    with clock.into(passes):
        result = parts.passes(plan, lambda micro: micro)
    begin = time.process_time()
    parts.end(plan, result)
    overhead = planned + time.process_time() - begin
    if is_baseline:
        overhead = 0.0
    if plan is not None:
        into.overhead.append(overhead)
    into.seconds.append(passes[0] + overhead)


def _measure_once(  # noqa: PLR0913 (one arm on one host)
    case: StepCase,
    host: StepHost,
    arm: StepArm,
    name: str,
    into: Measured,
    device: torch.device,
) -> None:
    # One after the other: what counts saved tensors holds them.
    with host.ready(name) as parts:
        live, plan = LiveBytes(), parts.plan()
        with live:
            result = parts.passes(plan, lambda micro: micro)
        parts.end(plan, result)
        followed = parts.followed()
    with host.ready(name) as parts:
        saved, plan = SavedBytes(host.layers), parts.plan()
        with saved.watching():
            result = parts.passes(plan, lambda micro: micro)
        parts.end(plan, result)
    del result
    into.saved_bytes = None if case.recompute else saved.total
    into.peak_bytes = live.peak if device.type == "cpu" else _cuda_peak(host, name)
    into.share_of_rows = _share(case, arm, followed)
    for micro in followed:
        into.flops += arm.flops(case, host.shape, micro)
        into.flops_causal += arm.flops(case, host.shape, micro, causal=True)
    with host.ready(name) as parts:
        traffic, plan = Traffic(), parts.plan()
        waits = DeviceWaits(host.weights)
        with waits.watching(), traffic:
            result = parts.passes(plan, lambda micro: _copied(micro, waits))
        into.waits = waits.total
        with waits.watching():
            parts.end(plan, result)
        into.waits_at_end = waits.total - into.waits
    into.sent_bytes, into.collective_bytes = traffic.sent, traffic.collective


def _copied(plan: ElisionPlan, waits: DeviceWaits) -> ElisionPlan:
    """Return a copy of the plan, as on a device: the session's own stays on the host."""
    tensors = {k: v.clone() for k, v in vars(plan).items() if isinstance(v, Tensor)}
    waits.put(tensors.values())
    return replace(plan, **tensors, sets=tuple(_copied(one, waits) for one in plan.sets))


def _share(case: StepCase, arm: StepArm, plans: Sequence[ElisionPlan]) -> float:
    """Return the rows that passed whole layers over those of a dense step, mean over layers."""
    gated = sum(s.last - s.first for s in arm.spans(case) if s.part == "layer")
    kept = sum(len(one.kept_BK) * one.num_slots for one in plans)
    full = sum(len(one.kept_BK) * one.num_tokens for one in plans)
    return (gated * kept / full + case.layers - gated) / case.layers


def _cuda_peak(host: StepHost, name: str) -> Any:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with host.ready(name) as parts:
        plan = parts.plan()
        parts.end(plan, parts.passes(plan, lambda micro: micro))
    return torch.cuda.max_memory_allocated() - before
