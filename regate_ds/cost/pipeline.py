"""The time of one step in a pipeline whose micro-batches differ, and an order that shortens it."""

from __future__ import annotations

from collections.abc import Sequence


def makespan(costs: Sequence[float], num_stages: int) -> float:
    """Return the time of a 1F1B schedule: of each micro-batch a forward pass of its cost on each
    stage, and a backward pass of twice that."""
    num = len(costs)
    forward = [[0.0] * num for _ in range(num_stages)]
    backward = [[0.0] * num for _ in range(num_stages)]
    ready = [0.0] * num_stages
    todo = [_order(stage, num_stages, num) for stage in range(num_stages)]
    while any(todo):
        for stage in range(num_stages):
            while todo[stage]:
                is_forward, micro = todo[stage][0]
                before = _before(forward, backward, stage, micro, is_forward)
                if before is None:
                    break
                end = max(ready[stage], before) + costs[micro] * (1 if is_forward else 2)
                (forward if is_forward else backward)[stage][micro] = ready[stage] = end
                todo[stage].pop(0)
    return max(ready)


def smooth_order(costs: Sequence[float]) -> list[int]:
    """Return an order in which cost rises to the middle and falls again.

    Where the pipeline fills and drains, the others wait for what is there: so that is cheap.
    """
    rising = sorted(range(len(costs)), key=lambda n: (costs[n], n))
    return [*rising[::2], *rising[1::2][::-1]]


def _order(stage: int, num_stages: int, num: int) -> list[tuple[bool, int]]:
    """Return a stage's passes in the order of 1F1B: whether forward, and the micro-batch."""
    warm = min(num_stages - 1 - stage, num)
    passes = [(True, micro) for micro in range(warm)]
    for micro in range(num):
        if warm + micro < num:
            passes.append((True, warm + micro))
        passes.append((False, micro))
    return passes


def _before(
    forward: list[list[float]],
    backward: list[list[float]],
    stage: int,
    micro: int,
    is_forward: bool,
) -> float | None:
    """Return when what a pass waits for has ended; None if it has not. Times are above 0."""
    if is_forward:
        return 0.0 if stage == 0 else forward[stage - 1][micro] or None
    if stage == len(forward) - 1:
        return forward[stage][micro] or None
    return backward[stage + 1][micro] or None
