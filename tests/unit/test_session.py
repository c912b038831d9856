"""The session's states and what it remembers."""

from __future__ import annotations

import pytest
import torch

from regate_ds.config import RegateConfig
from regate_ds.data.answer_index import AnswerIndex
from regate_ds.data.difficulty_store import DifficultyStore
from regate_ds.session import Regate
from tests.models import random_batch


class Sample:
    def __init__(self, key, labels_S):
        self.key, self.labels_S = key, labels_S
        self.is_placeholder_S = torch.zeros_like(labels_S, dtype=torch.bool)


class Reference:
    def __init__(self, index: AnswerIndex) -> None:
        self.index = index

    def read(self, keys):
        return torch.rand(len(self.index.locate(keys)), generator=torch.Generator().manual_seed(0))


def made(**knobs):
    _, batch = random_batch([[20], [13]], seed=1)
    index = AnswerIndex.build(
        Sample(key, batch.labels_BT[i]) for i, key in enumerate(batch.flat_keys)
    )
    store = DifficultyStore(index)
    config = RegateConfig(**{"total_steps": 4, "warmup": 0, "final_dense_share": 0.0, **knobs})
    return Regate(config, reference=Reference(index), difficulty=store), store, batch


def test_difficulty_changes_exactly_where_the_loss_ran():
    session, store, batch = made()
    plan = session.plan_step([batch]).micro[0]
    losses = torch.arange(1.0, plan.num_targets + 1)
    session.record(plan, losses)
    session.finish_step(applied=True)
    expected_BT = torch.zeros(batch.labels_BT.numel())
    expected_BT[plan.label_position_L] = 0.1 * losses
    expected = expected_BT.view_as(batch.labels_BT)[batch.is_label_BT]
    assert torch.allclose(store.read(batch.flat_keys), expected)
    assert 0 < plan.num_targets < int(batch.is_label_BT.sum())


def test_a_skipped_step_changes_no_difficulty_but_the_schedule_goes_on():
    session, store, batch = made()
    plan = session.plan_step([batch]).micro[0]
    session.record(plan, torch.ones(plan.num_targets))
    session.finish_step(applied=False)
    assert session.step == 1
    assert not store.read(batch.flat_keys).any()


def test_steps_must_be_planned_recorded_and_finished_in_turn():
    session, _, batch = made()
    with pytest.raises(RuntimeError, match="without a planned step"):
        session.finish_step(applied=True)
    plan = session.plan_step([batch]).micro[0]
    with pytest.raises(RuntimeError, match="planned already"):
        session.plan_step([batch])
    with pytest.raises(RuntimeError, match="no losses of micro-batches"):
        session.finish_step(applied=True)
    session.record(plan, torch.ones(plan.num_targets))
    with pytest.raises(RuntimeError, match="do not belong here"):
        session.record(plan, torch.ones(plan.num_targets))


def test_a_run_of_another_length_cannot_be_resumed():
    session, _, _ = made()
    other, _, _ = made(total_steps=5)
    with pytest.raises(ValueError, match="total_steps=5, but the checkpoint's run has 4"):
        other.load_state_dict(session.state_dict())


def test_elision_without_reference_losses_is_refused_and_the_dense_run_needs_none():
    config = RegateConfig(total_steps=4)
    with pytest.raises(ValueError, match="keep_share=0.5 needs the teacher's losses"):
        Regate(config, reference=None, difficulty=None)
    _, batch = random_batch([[20]], seed=1)
    dense = Regate(RegateConfig(total_steps=4, keep_share=1.0), reference=None, difficulty=None)
    assert dense.plan_step([batch]).is_dense


def test_samples_that_read_differently_than_in_the_store_are_refused():
    session, _, _ = made()
    _, other = random_batch([[20], [13]], seed=9)
    with pytest.raises(ValueError, match="compute the store again"):
        session.plan_step([other])


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("total_steps", 0),
        ("total_steps", True),
        ("keep_share", 0.0),
        ("keep_share", 1.5),
        ("keep_share", float("nan")),
        ("keep_share", "half"),
        ("first_layer", -1),
        ("last_layer", 1),
        ("align", "next"),
        ("fusion", "sum"),
        ("reference_weight", -1.0),
        ("decay", 1.0),
        ("warmup", -1),
        ("warmup", 1.5),
        ("cycle_steps", -1),
        ("cycle_dense_steps", 3),
        ("final_dense_share", 2.0),
        ("token_multiple", 0),
        ("enabled", "yes"),
    ],
)
def test_an_impossible_value_is_refused_by_name(knob: str, value: object):
    with pytest.raises(ValueError, match=f"^{knob}="):
        RegateConfig(**{"total_steps": 10, knob: value})
