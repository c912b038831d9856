"""A run that begins with merged steps: which they are, what they leave alone, what it reports."""

from __future__ import annotations

import logging

import pytest
import torch

from regate_ds.adapters.session_state import Opened
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.merge_switch import LENGTH
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.support.batches import random_batch
from tests.support.planning import config_of
from tests.support.stores import RandomReference, index_of, read_difficulty

BATCH = random_batch([[20], [13]], seed=1)[1]
KNOBS = {"merge.steps": 3, "warmup": 1, "final_dense_share": 0.25}
"""Of 11 steps three are merged; of the eight others one is warm-up, and the last two are dense."""


def made(total_steps: int = 11, **knobs) -> tuple[Regate, DifficultyStore]:
    index = index_of([BATCH])
    store = DifficultyStore(index)
    config = config_of(**{**KNOBS, **knobs})
    return Regate(config, Stores(RandomReference(index), store), total_steps=total_steps), store


def run_step(session: Regate, loss: float = 2.0) -> ElisionPlan:
    (plan,) = session.plan_step([BATCH]).micro
    session.record(plan, torch.full((plan.num_targets,), loss))
    session.finish_step(applied=True)
    return plan


def kind_of(plan: ElisionPlan) -> str:
    if plan.patches is not None:
        return "merged"
    return "sparse" if plan.moves_rows else "dense"


def test_merged_steps_come_first_and_the_rest_is_a_run_of_its_own():
    session, _ = made()
    kinds = [kind_of(run_step(session)) for _ in range(11)]
    assert kinds == ["merged"] * 3 + ["dense"] + ["sparse"] * 5 + ["dense"] * 2


def test_a_share_of_the_run_is_rounded_to_steps():
    assert config_of(**{"merge.steps": 0.66}).schedules(100).start == 66
    assert config_of(**{"merge.steps": 500}).schedules(100).start == 100


def test_all_schedules_begin_behind_the_merged_steps():
    late = config_of(**{**KNOBS, "images.keep_share": 0.5, "keep_share": SHARE}).schedules(11)
    knobs = {**KNOBS, "images.keep_share": 0.5, "keep_share": SHARE, "merge.steps": 0}
    alone = config_of(**knobs).schedules(8)
    for step in range(8):
        assert late.shares(step + 3) == alone.shares(step)
        assert late.is_dense(step + 3) == alone.is_dense(step)
    assert not any(late.chooses_answers(step) or late.chooses_images(step) for step in range(3))
    assert late.num_sparse(11) == alone.num_sparse(8) + 3


SHARE = {"points": [[0.0, 0.6], [1.0, 0.2]]}


def test_a_run_whose_other_steps_never_elide_is_told_so():
    config = config_of(**{**KNOBS, "warmup": 8})
    assert list(config.never_sparse(11)) == ["schedule"]
    assert not config_of(**KNOBS).never_sparse(11)


def test_merged_steps_change_no_difficulty_and_ask_for_no_score():
    session, store = made()
    for _ in range(3):
        assert not session.chooses_answers(session.coming_step)
        run_step(session, loss=5.0)
    assert not bool(read_difficulty(store, BATCH.flat_keys).any())
    run_step(session, loss=5.0)
    assert bool(read_difficulty(store, BATCH.flat_keys).any())


def test_what_a_merged_step_counts():
    session, _ = made()
    step = session.plan_step([BATCH])
    (plan,) = step.micro
    assert step.is_merged
    assert not step.is_dense
    assert step.num_targets_global == plan.num_targets == BATCH.num_labels
    assert step.counts["tokens_kept"] == plan.num_kept < step.counts["tokens_total"] == 33
    assert step.counts["answer_entered"] < step.counts["answer_kept"] == plan.num_targets
    assert step.counts["image_kept"] == step.counts["filled"] == 0


def test_the_jump_in_loss_is_reported_once(caplog: pytest.LogCaptureFixture):
    session, _ = made(total_steps=20, **{"merge.steps": LENGTH + 2})
    found = []
    with caplog.at_level(logging.INFO):
        for step in range(LENGTH + 4):
            run_step(session, loss=9.0 - 0.1 * step)
            found.append(session.switch_figures)
    first = LENGTH + 2
    before = [9.0 - 0.1 * step for step in range(first - LENGTH, first)]
    assert found.pop(first) == {
        "loss_merged": pytest.approx(sum(before) / LENGTH),
        "loss_single": pytest.approx(9.0 - 0.1 * first),
    }
    assert not any(found)
    (line,) = caplog.messages
    assert line.startswith(f"step {first} is the first on single tokens: its loss is 8.0000")


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole, store = made()
    plans = [run_step(whole, loss=1.0 + n) for n in range(11)]
    for stop in (2, 3, 6):
        first, first_store = made()
        for n in range(stop):
            run_step(first, loss=1.0 + n)
        Opened(first, first_store).save(tmp_path / str(stop))
        second, second_store = made()
        Opened(second, second_store).load(tmp_path / str(stop))
        for n in range(stop, 11):
            plan = run_step(second, loss=1.0 + n)
            assert torch.equal(plan.position_R, plans[n].position_R)
        found = read_difficulty(second_store, BATCH.flat_keys)
        assert torch.equal(found, read_difficulty(store, BATCH.flat_keys))


def test_a_resume_with_other_merged_steps_is_refused():
    for saved, other in ((3, 0), (3, 4), (0, 3)):
        state = made(**{"merge.steps": saved})[0].state_dict()
        message = f"merge.steps={other} makes {other} merged steps, but .* has {saved}; resume"
        with pytest.raises(ValueError, match=message):
            made(**{"merge.steps": other})[0].load_state_dict(state)
    assert "merged_steps" not in made(**{"merge.steps": 0})[0].state_dict()


def test_a_micro_batch_none_of_whose_targets_a_patch_predicts_adds_nothing():
    labels = torch.full((1, 3), -100)
    labels[0, 0] = 7
    short = type(BATCH)(((("set", 9),),), torch.zeros(1, 3, dtype=torch.int64), labels)
    config = config_of(**{**KNOBS, "score": "random"})
    session = Regate(config, Stores(), total_steps=11)
    (one, _) = session.plan_step([short, BATCH]).micro
    assert one.num_targets == 1  # the answer's first token, by the prompt's patch
    labels = torch.tensor([[7, 8, -100]])
    short = type(BATCH)(((("set", 9),),), torch.zeros(1, 3, dtype=torch.int64), labels)
    session.abandon_step()
    (one, _) = session.plan_step([short, BATCH]).micro
    assert one.num_targets == 2
