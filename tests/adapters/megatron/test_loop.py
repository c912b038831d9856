"""Without elision the run is the host's; with it, bytes and memory are what the plan says."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from tests.adapters.megatron import loop_helper
from tests.adapters.megatron.cases_helper import HIDDEN, Case
from tests.adapters.megatron.checks_helper import plans_of
from tests.adapters.megatron.pool_helper import Pool

LAYOUTS = [
    Case(),
    Case(pp=2, recompute="full"),
    Case(tp=2, sp=True),
    Case(cp=2),
    Case(pp=2, vpp=2),
    Case(model="llava", pp=2),
    Case(tp=2, pp=2, sp=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*LAYOUTS, Case(dp=2, model="moe", ep=2)], ids=str)
def test_switched_off_or_taken_off_the_run_is_the_hosts_bit_for_bit(pool: Pool, case: Case):
    pool.run(case.world, loop_helper.check_disabled, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_a_dense_step_leaves_the_decoders_output_bit_for_bit(pool: Pool, case: Case):
    pool.run(case.world, loop_helper.check_dense, case)


@pytest.mark.slow
@pytest.mark.parametrize("vpp", [1, 2])
@pytest.mark.parametrize("row_format", ["padded", "ragged"])
def test_stages_send_what_the_plan_says_and_less_than_without_it(
    pool: Pool, row_format: str, vpp: int
):
    case = Case(pp=2, vpp=vpp, row_format=row_format, image_share=0.5)
    dense = pool.run(2, loop_helper.check_bytes, replace(case, dense=True))
    kept = pool.run(2, loop_helper.check_bytes, case)
    for sent, expected in dense + kept:
        assert sent == expected
    assert sum(sent for sent, _ in kept) < sum(sent for sent, _ in dense)


@pytest.mark.slow
def test_past_stages_of_an_early_range_elided_rows_take_one_message(pool: Pool):
    case = Case(pp=4, last_layer=3, row_format="ragged")
    reports = pool.run(4, loop_helper.check_bytes, case)
    assert all(sent == expected for sent, expected in reports)
    micro = plans_of(case)[1].micro
    full = sum(plan.segment_BK.shape[0] * plan.num_tokens for plan in micro)
    kept = sum(plan.num_kept for plan in micro)
    # Three edges carry what is kept, one message the rest: 3 k + (f - k) rows, there and back.
    assert sum(sent for sent, _ in reports) == 2 * (full + 2 * kept) * HIDDEN * 4


@pytest.mark.slow
def test_frozen_embeddings_before_an_early_range_leave_no_rank_waiting(pool: Pool):
    pool.run(2, loop_helper.check_frozen, Case(pp=2, first_layer=0, last_layer=3))


@pytest.mark.slow
def test_transfers_behind_the_computation_change_no_bit(pool: Pool):
    pool.run(2, loop_helper.check_overlap, Case(pp=2, vpp=2, row_format="ragged"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(cp=2), Case(pp=2, image_share=0.5), Case(dp=2)], ids=str)
def test_difficulty_is_remembered_once_a_step_that_was_applied(pool: Pool, case: Case):
    pool.run(case.world, loop_helper.check_memory, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "last"), [("selective", None), ("full", None), ("selective", 6)]
)
def test_saved_activations_shrink_as_the_rows_of_the_layers_do(
    pool: Pool, recompute: str, last: int | None
):
    # Attention is recomputed: its scores, which grow with the square, are not saved.
    case = Case(rows=1, length=96, num_layers=8, recompute=recompute, num_micro=1, last_layer=last)
    ((dense_bytes, dense_rows),) = pool.run(
        1, loop_helper.check_activations, replace(case, dense=True)
    )
    ((kept_bytes, kept_rows),) = pool.run(1, loop_helper.check_activations, case)
    assert kept_rows < 0.9 * dense_rows
    assert kept_bytes / dense_bytes == pytest.approx(kept_rows / dense_rows, rel=0.05)


@pytest.mark.slow
def test_kept_rows_are_cut_anew_once_a_micro_batch_and_pass(pool: Pool):
    case = Case(cp=2)
    reports = pool.run(2, loop_helper.check_gathered, case)
    assert all(num_exchanges == 2 * case.num_micro for num_exchanges, _, _ in reports)
    there_and_back = sum(num_bytes for _, num_bytes, _ in reports)
    assert there_and_back == 2 * sum(said for _, _, said in reports) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case(tp=2, sp=True, token_multiple=2, image_share=0.5), Case(pp=2, row_format="ragged")],
    ids=str,
)
def test_megatrons_optimizer_learns_alike_under_any_layout(pool: Pool, case: Case):
    single = replace(case, tp=1, sp=False, pp=1)
    (alone,) = pool.run(1, loop_helper.check_training, single)
    together = pool.run(2, loop_helper.check_training, case)[-1]
    assert together == pytest.approx(alone, rel=1e-4)
    assert alone[1] < 0.95 * alone[0]


@pytest.mark.slow
def test_the_distributed_optimizer_learns_as_the_plain_one(pool: Pool):
    plain = pool.run(2, loop_helper.check_training, Case(dp=2))
    sharded = pool.run(2, loop_helper.check_training, Case(dp=2, distributed_optimizer=True))
    for mine, theirs in zip(sharded, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_half_precision_goes_through_float16module(pool: Pool):
    case = Case(pp=2)
    (losses,) = (part for part in pool.run(2, loop_helper.check_half, case) if part)
    wanted = pool.run(1, loop_helper.plain_losses, replace(case, pp=1))[0]
    assert losses == pytest.approx(wanted, rel=0.1, abs=0.1)
