"""What a session refuses: steps out of turn, a run that is over, data that has changed."""

from __future__ import annotations

import pytest
import torch

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.support.models import random_batch
from tests.support.planning import config_of
from tests.support.stores import RandomReference, index_of, read_difficulty

BATCH = random_batch([[20], [13]], seed=1)[1]
INDEX = index_of([BATCH])


def made(total_steps: int = 4, difficulty: DifficultyStore | None = None) -> Regate:
    config = config_of(warmup=0)
    difficulty = difficulty or DifficultyStore(INDEX)
    return Regate(config, Stores(RandomReference(INDEX), difficulty), total_steps=total_steps)


def open_step(session: Regate):
    (plan,) = session.plan_step([BATCH]).micro
    return plan


def test_nothing_can_be_recorded_or_finished_before_a_plan():
    session = made()
    plan = open_step(made())
    with pytest.raises(RuntimeError, match="record without a planned step; call plan_step"):
        session.record(plan, torch.ones(plan.num_targets))
    with pytest.raises(RuntimeError, match="finish_step without a planned step"):
        session.finish_step(applied=True)


def test_a_step_cannot_be_planned_twice():
    session = made()
    open_step(session)
    with pytest.raises(RuntimeError, match="step 0 is planned but not ended"):
        session.plan_step([BATCH])


def test_a_step_cannot_end_without_the_losses_of_every_micro_batch():
    session = made()
    plans = session.plan_step([BATCH, BATCH]).micro
    session.record(plans[0], torch.ones(plans[0].num_targets))
    with pytest.raises(RuntimeError, match=r"step 0: no losses of micro-batches \[1\]"):
        session.finish_step(applied=True)


def test_losses_cannot_be_recorded_twice():
    session = made()
    plan = open_step(session)
    session.record(plan, torch.ones(plan.num_targets))
    with pytest.raises(RuntimeError, match="step 0, micro-batch 0 do not belong here"):
        session.record(plan, torch.ones(plan.num_targets))


def test_losses_of_a_plan_for_evaluation_do_not_belong_to_the_step():
    session = made()
    open_step(session)
    other = session.plan_evaluation(lambda: [BATCH]).micro[0]
    with pytest.raises(RuntimeError, match="step 0, micro-batch 0 do not belong here"):
        session.record(other, torch.ones(other.num_targets))


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="the window of step 0 is empty; give its micro-batches"):
        made().plan_step([])


def test_losses_of_an_earlier_step_do_not_belong_to_this_one():
    session = made()
    earlier = open_step(session)
    session.record(earlier, torch.ones(earlier.num_targets))
    session.finish_step(applied=True)
    open_step(session)
    with pytest.raises(RuntimeError, match="losses of step 0, micro-batch 0 do not belong"):
        session.record(earlier, torch.ones(earlier.num_targets))


def test_there_must_be_one_loss_for_each_target():
    session = made()
    plan = open_step(session)
    with pytest.raises(ValueError, match=rf"{plan.num_targets} targets, but loss \(3,\)"):
        session.record(plan, torch.ones(3))


def test_a_run_that_is_over_plans_no_further_step():
    session = made(total_steps=1)
    plan = open_step(session)
    session.record(plan, torch.ones(plan.num_targets))
    session.finish_step(applied=True)
    with pytest.raises(ValueError, match="step 1 is beyond total_steps=1; set total_steps"):
        session.plan_step([BATCH])


def test_other_labels_of_the_same_number_are_refused_naming_the_sample():
    labels_BT = BATCH.labels_BT.clone()
    row, position = BATCH.is_label_BT.nonzero()[-1].tolist()
    labels_BT[row, position] += 1
    name, number = BATCH.flat_keys[int(BATCH.sample_BT[row, position])]
    changed = TokenBatch(BATCH.keys, BATCH.segment_BT, labels_BT)
    cause = f"sample '{name}' record {number} has other answer tokens here than its"
    with pytest.raises(ValueError, match=cause):
        made().plan_step([changed])


def test_state_is_saved_between_steps_only():
    session = made()
    open_step(session)
    with pytest.raises(RuntimeError, match="step 0 is open; save between steps"):
        session.state_dict()


def test_a_run_of_another_length_cannot_be_resumed():
    with pytest.raises(ValueError, match="total_steps=5, but the checkpoint's run has 4"):
        made(total_steps=5).load_state_dict(made().state_dict())


def test_a_sample_with_another_number_of_labels_than_in_the_store_is_refused():
    labels = BATCH.labels_BT.clone()
    last = int(BATCH.is_label_BT[1].nonzero()[-1])
    labels[1, last] = IGNORE
    known = int(BATCH.is_label_BT[1].sum())
    message = f"'set' record 1 has {known - 1} answer tokens here, but {known} in the reference"
    with pytest.raises(ValueError, match=message):
        made().plan_step([TokenBatch(BATCH.keys, BATCH.segment_BT, labels)])


def test_a_sample_that_the_store_does_not_know_is_refused():
    keys = ((("set", 0),), (("elsewhere", 7),))
    with pytest.raises(ValueError, match="sample 'elsewhere' record 7 is not in the answer index"):
        made().plan_step([TokenBatch(keys, BATCH.segment_BT, BATCH.labels_BT)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_named_and_not_remembered(value: float):
    difficulty = DifficultyStore(INDEX)
    session = made(difficulty=difficulty)
    plan = open_step(session)
    losses_L = torch.ones(plan.num_targets)
    losses_L[-1] = value
    row, position = divmod(int(plan.label_position_L[-1]), plan.num_tokens)
    key = BATCH.flat_keys[int(BATCH.sample_BT[row, position])]
    session.record(plan, losses_L)
    named = f"step 0: the loss of sample '{key[0]}' record {key[1]} at position {position} of row"
    with pytest.raises(RuntimeError, match=f"{named} {row} is {value}"):
        session.finish_step(applied=True)
    assert not read_difficulty(difficulty, BATCH.flat_keys).any()
