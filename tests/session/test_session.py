"""The session's states, what it plans with, and what it remembers."""

from __future__ import annotations

import pytest
import torch

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan, StepPlan
from regate_ds.algorithm.rows import RowLayout
from regate_ds.config import RegateConfig
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.support.models import random_batch
from tests.support.planning import config_of, fuse, plan_sparse
from tests.support.stores import RandomReference, index_of, read_difficulty, write_difficulty

BATCH = random_batch([[20], [13]], seed=1)[1]


def made(
    batches: tuple[TokenBatch, ...] = (BATCH,),
    total_steps: int = 4,
    rows: RowLayout | None = None,
    **knobs,
):
    """A session whose steps are all sparse, and its difficulty store."""
    index = index_of(batches)
    store = DifficultyStore(index)
    config = config_of(**{"warmup": 0, "final_dense_share": 0.0, **knobs})
    stores = Stores(RandomReference(index), store)
    return Regate(config, stores, total_steps=total_steps, rows=rows), store


def other_batch(seed: int, rows=((17,), (9,))) -> TokenBatch:
    _, batch = random_batch([list(row) for row in rows], seed=seed)
    keys = tuple(tuple((f"set{seed}", n) for _, n in row) for row in batch.keys)
    return TokenBatch(keys, batch.segment_BT, batch.labels_BT)


def made_up(plan: ElisionPlan, seed: int = 0) -> torch.Tensor:
    """Losses a model might have found."""
    return torch.rand(plan.num_targets, generator=torch.Generator().manual_seed(seed)) * 5


def run_step(session: Regate, *window: TokenBatch, applied: bool = True) -> StepPlan:
    step = session.plan_step(window)
    for plan in step.micro:
        session.record(plan, made_up(plan, seed=10 * step.step + plan.micro))
    session.finish_step(applied=applied)
    return step


def remembered(batch: TokenBatch, old_N, plan: ElisionPlan, losses_L, decay: float) -> torch.Tensor:
    """The difficulty after a step, position by position."""
    value_of = dict(zip(batch.is_label_BT.flatten().nonzero().flatten().tolist(), old_N.tolist()))
    for position, loss in zip(plan.label_position_L.tolist(), losses_L.tolist(), strict=True):
        value_of[position] = decay * value_of[position] + (1 - decay) * loss
    return torch.tensor(list(value_of.values()))


@pytest.mark.parametrize("fusion", ["additive", "convex"])
@pytest.mark.parametrize("align", ["predictor", "target", "both"])
def test_a_sparse_step_keeps_what_reference_and_difficulty_rank_highest(fusion: str, align: str):
    knobs = {"reference_weight": 0.3, "fusion": fusion}
    session, store = made(align=align, keep_share=0.4, token_multiple=4, **knobs)
    write_difficulty(store, BATCH.flat_keys, torch.rand(int(BATCH.is_label_BT.sum())))
    (plan,) = session.plan_step([BATCH]).micro
    reference_N = RandomReference(store.index).read(BATCH.flat_keys)
    score_N = fuse(reference_N, read_difficulty(store, BATCH.flat_keys), **knobs)
    wanted = plan_sparse(BATCH, score_N, keep_share=0.4, align=align, token_multiple=4)
    assert torch.equal(plan.kept_BK, wanted.kept_BK)
    assert torch.equal(plan.segment_BK, wanted.segment_BK)


def test_difficulty_changes_exactly_where_the_loss_ran():
    session, store = made(decay=0.9)
    old_N = torch.rand(int(BATCH.is_label_BT.sum()))
    write_difficulty(store, BATCH.flat_keys, old_N)
    (plan,) = run_step(session, BATCH).micro
    expected = remembered(BATCH, old_N, plan, made_up(plan), 0.9)
    assert torch.allclose(read_difficulty(store, BATCH.flat_keys), expected)
    assert 0 < plan.num_targets < len(old_N)


def test_a_dense_step_remembers_every_label_position():
    session, store = made(warmup=1)
    assert run_step(session, BATCH).is_dense
    assert bool((read_difficulty(store, BATCH.flat_keys) > 0).all())


def test_every_micro_batch_of_a_step_is_planned_and_remembered():
    window = (BATCH, other_batch(5), other_batch(6, rows=((4, 6), (11,))))
    session, store = made(window)
    step = run_step(session, *window)
    assert [(plan.step, plan.micro) for plan in step.micro] == [(0, 0), (0, 1), (0, 2)]
    for batch, plan in zip(window, step.micro, strict=True):
        nothing = torch.zeros(int(batch.is_label_BT.sum()))
        expected = remembered(batch, nothing, plan, made_up(plan, plan.micro), 0.9)
        assert torch.allclose(read_difficulty(store, batch.flat_keys), expected)


def test_losses_may_come_in_any_order():
    window = (BATCH, other_batch(5))
    stores = []
    for order in (1, -1):
        session, store = made(window)
        for plan in session.plan_step(window).micro[::order]:
            session.record(plan, made_up(plan, plan.micro))
        session.finish_step(applied=True)
        stores.append(read_difficulty(store, [key for batch in window for key in batch.flat_keys]))
    assert torch.equal(*stores)


def test_of_a_sample_that_a_step_sees_twice_the_last_occurrence_counts_once():
    session, store = made()
    step = run_step(session, BATCH, BATCH)
    nothing = torch.zeros(int(BATCH.is_label_BT.sum()))
    expected = remembered(BATCH, nothing, step.micro[1], made_up(step.micro[1], seed=1), 0.9)
    assert torch.allclose(read_difficulty(store, BATCH.flat_keys), expected)


def test_a_skipped_step_changes_no_difficulty_but_the_schedule_goes_on():
    session, store = made()
    run_step(session, BATCH, applied=False)
    assert session.step == 1
    assert not read_difficulty(store, BATCH.flat_keys).any()


def test_a_resumed_run_plans_and_remembers_like_one_that_never_stopped(tmp_path):
    batches = (BATCH, other_batch(5))
    whole, whole_store = made(batches, total_steps=6, warmup=1, cycle_steps=3, cycle_dense_steps=1)
    begun, begun_store = made(batches, total_steps=6, warmup=1, cycle_steps=3, cycle_dense_steps=1)
    plans = [run_step(whole, batches[i % 2]) for i in range(6)]
    for i in range(3):
        run_step(begun, batches[i % 2])
    begun_store.save(tmp_path)
    rest, rest_store = made(batches, total_steps=6, warmup=1, cycle_steps=3, cycle_dense_steps=1)
    rest.load_state_dict(begun.state_dict())
    rest_store.load(tmp_path)
    for i in range(3, 6):
        step = run_step(rest, batches[i % 2])
        assert (step.step, step.is_dense) == (i, plans[i].is_dense)
        assert torch.equal(step.micro[0].kept_BK, plans[i].micro[0].kept_BK)
    keys = [key for batch in batches for key in batch.flat_keys]
    assert torch.equal(read_difficulty(rest_store, keys), read_difficulty(whole_store, keys))


@pytest.mark.parametrize("knobs", [{}, {"warmup": 1}, {"token_multiple": 16}, {"align": "both"}])
def test_counts_are_those_of_the_plans(knobs: dict):
    window = (BATCH, other_batch(6, rows=((4, 6), (11,))))
    session, _ = made(window, **knobs)
    step = session.plan_step(window)
    segments = [plan.segment_BK.flatten().tolist() for plan in step.micro]
    assert step.counts == {
        "tokens_total": 20 + 13 + 4 + 6 + 11,
        "tokens_kept": sum(s >= 0 for row in segments for s in row),
        "answer_total": sum(y >= 0 for batch in window for y in batch.labels_BT.flatten().tolist()),
        "answer_kept": sum(len(plan.targets_L) for plan in step.micro),
        "answer_entered": sum(len(plan.targets_L) for plan in step.micro),
        "image_total": 0,
        "image_kept": 0,
        "filled": sum(plan.num_filled for plan in step.micro),
        "padded": sum(s < 0 for row in segments for s in row),
    }
    assert step.num_targets_global == step.counts["answer_kept"]


def test_the_run_follows_the_schedule_of_its_config():
    knobs = {"warmup": 0.2, "cycle_steps": 4, "cycle_dense_steps": 1, "final_dense_share": 0.1}
    session, _ = made(total_steps=20, **knobs)
    schedule = config_of(**knobs).schedule.in_steps(20)
    dense = [run_step(session, BATCH).is_dense for _ in range(20)]
    assert dense == [schedule.is_dense(i) for i in range(20)]
    assert [i for i in range(20) if dense[i]] == [0, 1, 2, 3, 4, 8, 12, 16, 18, 19]


@pytest.mark.parametrize("dense", [{"keep_share": 1.0}, {"execution": "none"}])
def test_the_dense_baseline_needs_no_stores_and_is_dense_throughout(dense: dict):
    config = config_of(warmup=0, final_dense_share=0.0, **dense)
    session = Regate(config, Stores(), total_steps=4)
    assert all(run_step(session, BATCH).is_dense for _ in range(4))


@pytest.mark.parametrize("given", ["reference", "difficulty", None])
def test_elision_without_both_stores_is_refused(given: str | None):
    index = index_of([BATCH])
    stores = {"reference": RandomReference(index), "difficulty": DifficultyStore(index)}
    chosen = {name: stores[name] if name == given else None for name in stores}
    lacking = "statistics of its own" if given == "reference" else "the teacher's losses"
    with pytest.raises(ValueError, match=f"score=Fused needs {lacking}; give Stores"):
        Regate(RegateConfig(), Stores(**chosen), total_steps=4)


def test_rows_of_a_steps_micro_batches_are_of_one_length_where_the_host_asks():
    batches = (BATCH, other_batch(2), other_batch(3, rows=((30,), (8,))))
    session, _ = made(batches, rows=RowLayout(equal=True))
    equal = session.plan_step(batches)
    other, _ = made(batches)
    uneven = other.plan_step(batches)
    longest = max(plan.num_slots for plan in uneven.micro)
    assert [plan.num_slots for plan in equal.micro] == [longest] * 3
    assert len({plan.num_slots for plan in uneven.micro}) > 1
    assert equal.counts["tokens_kept"] == uneven.counts["tokens_kept"]
    assert equal.counts["padded"] == sum(plan.num_padded for plan in equal.micro)
