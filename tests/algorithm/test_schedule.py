"""The schedule against the run written out step by step."""

from __future__ import annotations

import itertools

import pytest

from regate_ds.algorithm.schedule import Course, KeepShare, MovingShare, Schedule


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
    made = schedule(1280, 0, 128, 16, 0)
    assert Course(schedule=made, share=0.5).expected_share() == 0.5625


@pytest.mark.parametrize("keep_share", [0.25, 0.5, 1.0])
def test_the_expected_share_is_the_mean_over_the_steps(keep_share: float):
    made = schedule(100, 7, 20, 3, 12)
    shares = [1.0 if made.is_dense(step) else keep_share for step in range(100)]
    found = Course(schedule=made, share=keep_share).expected_share()
    assert found == pytest.approx(sum(shares) / 100)


LINE = MovingShare(points=((0.0, 0.7), (1.0, 0.3)))
BENT = MovingShare(points=((0.0, 1.0), (0.25, 0.4), (0.75, 0.6)))
STEPS = MovingShare(points=((0.0, 0.7), (0.5, 0.4)), between="steps")


def test_a_line_goes_from_the_first_sparse_step_to_the_last():
    made = Course(schedule=schedule(10, warmup=2, final=3), share=LINE)
    wanted = [1, 1, 0.7, 0.6, 0.5, 0.4, 0.3, 1, 1, 1]
    assert [made.at(step) for step in range(10)] == pytest.approx(wanted)
    assert (made.at(2), made.at(6)) == (0.7, 0.3)
    assert made.expected_share() == pytest.approx(sum(wanted) / 10)
    assert made.expected_share(4) == pytest.approx(sum(wanted[:4]) / 4)


def test_a_line_with_bends_stays_at_its_last_point_and_is_dense_where_it_keeps_all():
    made = Course(schedule=schedule(9), share=BENT)
    wanted = [1.0, 0.7, 0.4, 0.45, 0.5, 0.55, 0.6, 0.6, 0.6]
    assert [made.at(step) for step in range(9)] == pytest.approx(wanted)
    assert [step for step in range(9) if not made.chooses(step)] == [0]
    assert made.ever_chooses(9)
    assert not made.ever_chooses(1)


def test_steps_hold_each_share_up_to_the_next():
    made = Course(schedule=schedule(11, warmup=1, final=1), share=STEPS)
    assert [made.at(step) for step in range(11)] == [1.0, *[0.7] * 4, *[0.4] * 5, 1.0]


def test_in_cycles_the_share_moves_on_through_dense_steps():
    made = Course(schedule=schedule(8, cycle=4, cycle_dense=1), share=LINE)
    wanted = [1.0, *(0.7 - 0.4 * step / 7 for step in (1, 2, 3)), 1.0]
    assert [made.at(step) for step in range(5)] == pytest.approx(wanted)


@pytest.mark.parametrize("parts", [(5, 5, 0), (5, 0, 5), (1, 0, 0), (5, 4, 0), (5, 9, 9)])
def test_a_sparse_part_of_one_step_or_none_is_a_place_too(parts: tuple[int, int, int]):
    total, warmup, final = parts
    made = Course(schedule=schedule(total, warmup=warmup, final=final), share=LINE)
    shares = [made.at(step) for step in range(total + 2)]
    assert all(0.3 <= share <= 1.0 for share in shares)


def test_the_mean_of_a_share_that_does_not_move_is_the_papers_formula_bit_for_bit():
    for share in (0.1, 0.3, 0.37, 0.9):
        made = schedule(100, 7, 20, 3, 12)
        num_sparse = sum(not made.is_dense(step) for step in range(100))
        found = Course(schedule=made, share=share).expected_share()
        assert found == 1.0 - num_sparse * (1.0 - share) / 100


@pytest.mark.parametrize("share", [0.5, LINE, BENT])
def test_whether_a_run_is_ever_sparse_is_found_without_a_walk_over_its_steps(share: KeepShare):
    for parts in itertools.product((0, 2, 9), (0, 3), (0, 1, 3), (0, 4, 9)):
        warmup, cycle, cycle_dense, final = parts
        made = schedule(9, warmup, cycle, min(cycle, cycle_dense), final)
        course = Course(schedule=made, share=share)
        for num_steps in (0, 1, 3, 9):
            assert course.ever_chooses(num_steps) == any(map(course.chooses, range(num_steps)))
    endless = schedule(10**15, warmup=10**14)
    assert Course(schedule=endless, share=share).ever_chooses(10**15)
