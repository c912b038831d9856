"""The schedule against the run written out step by step."""

from __future__ import annotations

import itertools

import pytest

from regate_ds.algorithm.schedule import Schedule


def schedule(total=20, warmup=0, cycle=0, cycle_dense=0, final=0) -> Schedule:
    return Schedule(
        total_steps=total,
        warmup_steps=warmup,
        cycle_steps=cycle,
        cycle_dense_steps=cycle_dense,
        final_dense_steps=final,
    )


def dense_steps(made: Schedule) -> list[int]:
    return [step for step in range(made.total_steps) if made.is_dense(step)]


def written_out(total: int, warmup: int, cycle: int, cycle_dense: int, final: int) -> list[int]:
    """Lay the run out as a row of D and s, part by part."""
    one_cycle = "D" * cycle_dense + "s" * (cycle - cycle_dense)
    endless = one_cycle * total if cycle else "s" * total
    run = ("D" * warmup + endless)[: total - final] + "D" * final
    return [step for step, kind in enumerate(run[-total:] if final > total else run) if kind == "D"]


def test_any_schedule_is_the_run_written_out():
    parts = itertools.product([0, 3, 25], [0, 4, 7], [0, 1, 4], [0, 5, 20])
    for warmup, cycle, cycle_dense, final in parts:
        if cycle_dense <= cycle:
            made = schedule(20, warmup, cycle, cycle_dense, final)
            assert dense_steps(made) == written_out(20, warmup, cycle, cycle_dense, final)


def test_warm_up_cycles_and_the_final_block_are_dense():
    made = schedule(warmup=2, cycle=5, cycle_dense=1, final=3)
    assert dense_steps(made) == [0, 1, 2, 7, 12, 17, 18, 19]


def test_without_cycles_only_the_ends_are_dense():
    assert dense_steps(schedule(warmup=3, final=2)) == [0, 1, 2, 18, 19]


def test_a_cycle_of_dense_steps_alone_is_a_dense_run():
    assert dense_steps(schedule(cycle=4, cycle_dense=4)) == list(range(20))


def test_the_papers_cycle_processes_the_share_that_it_states():
    assert schedule(1280, 0, 128, 16, 0).expected_share(0.5) == 0.5625


@pytest.mark.parametrize("keep_share", [0.25, 0.5, 1.0])
def test_the_expected_share_is_the_mean_over_the_steps(keep_share: float):
    made = schedule(100, 7, 20, 3, 12)
    shares = [1.0 if made.is_dense(step) else keep_share for step in range(100)]
    assert made.expected_share(keep_share) == pytest.approx(sum(shares) / 100)
