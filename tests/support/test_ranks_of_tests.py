"""The helper itself: a failing rank must fail the test, and quickly."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import TIMEOUT_SECONDS, run_ranks

pytestmark = pytest.mark.slow


def check_ranks_add_up(rank: int, expected: int) -> None:
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    assert int(total) == expected


def check_one_fails_while_others_wait(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 is unwell")
    time.sleep(600)


def check_never_ends(rank: int) -> None:
    time.sleep(600 * rank)


def test_ranks_form_one_group():
    run_ranks(check_ranks_add_up, 2, 3)


def test_a_failing_rank_shows_its_traceback_and_ends_the_others():
    begin = time.monotonic()
    with pytest.raises(Exception, match="rank 1 is unwell"):
        run_ranks(check_one_fails_while_others_wait, 2)
    assert time.monotonic() - begin < TIMEOUT_SECONDS / 2


def test_a_rank_that_hangs_is_killed_and_named():
    with pytest.raises(TimeoutError, match="did not finish check_never_ends in 8"):
        run_ranks(check_never_ends, 2, timeout=8)
