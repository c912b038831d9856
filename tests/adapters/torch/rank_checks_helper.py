"""Loops of plain torch and accelerate on two ranks, against one process on the joint batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tests.adapters.deepspeed.zero_cases_helper import ZeroCase
from tests.adapters.deepspeed.zero_checks_helper import TOLERANCE, joint_gradients
from tests.adapters.torch.loops_helper import CASES, LOOPS, UNREACHED, Found
from tests.support.measure import assert_gradients_equal


def check_case(rank: int, run: Callable[[int, ZeroCase], Found], case: ZeroCase) -> None:
    found, (wanted, all_losses) = run(rank, case), joint_gradients(case)
    own = all_losses[rank * case.accumulation :][: case.accumulation]
    for mine, theirs in zip(found.losses, own, strict=True):
        assert torch.allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    wanted = {n: g for n, g in wanted.items() if not any(part in n for part in UNREACHED)}
    assert_gradients_equal(found.gradients, wanted, TOLERANCE)


CHECKS: dict[str, Callable[[int], None]] = {
    name: partial(check_case, run=LOOPS[loop], case=case) for name, (loop, case) in CASES.items()
}
