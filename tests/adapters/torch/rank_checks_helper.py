"""Loops of plain torch and accelerate on two ranks, against one process on the joint batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tests.adapters.deepspeed.zero_cases_helper import ZeroCase
from tests.adapters.deepspeed.zero_checks_helper import TOLERANCE, joint_gradients
from tests.adapters.torch.loops_helper import BY_BFLOAT16, CASES, LOOPS, UNREACHED
from tests.support.measure import Gradients, assert_gradients_equal, relative_error


def reached(gradients: Gradients) -> Gradients:
    return {n: g for n, g in gradients.items() if not any(part in n for part in UNREACHED)}


def check_case(rank: int, loop: str, case: ZeroCase) -> None:
    found, (wanted, all_losses) = LOOPS[loop](rank, case), joint_gradients(case)
    own = all_losses[rank * case.accumulation :][: case.accumulation]
    mine, wanted = reached(found.gradients), reached(wanted)
    if loop in BY_BFLOAT16:
        # It has three digits; a wrong scale would be off by a factor.
        assert relative_error(mine, wanted) < 0.03
        return
    for losses, their_losses in zip(found.losses, own, strict=True):
        assert torch.allclose(losses, their_losses, rtol=TOLERANCE, atol=TOLERANCE)
    assert_gradients_equal(mine, wanted, TOLERANCE)


CHECKS: dict[str, Callable[[int], None]] = {
    name: partial(check_case, loop=loop, case=case) for name, (loop, case) in CASES.items()
}
