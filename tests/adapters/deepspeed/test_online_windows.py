"""A loop whose teacher scores one step ahead plans and remembers what a loop with a store does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regate_ds.adapters.torch.attach import attach
from regate_ds.adapters.torch.loop import LoopRegate
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.data.collate import Batch
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.teacher.api import Teacher
from regate_ds.teacher.online import OnlineReference, samples_of
from tests.adapters.deepspeed.test_loop import batches, config, engine, run
from tests.support.models import causal_lm, text_config
from tests.support.stores import index_of, read_difficulty

LOADER = [batch for _ in range(3) for batch in batches(4)]
INDEX = index_of(batch.tokens for batch in batches(4))


class Stored:
    """Losses of all samples, computed before training, each sample alone, as fp16."""

    def __init__(self, index: AnswerIndex, online: OnlineReference) -> None:
        self.index, self._values = index, {}
        for batch in batches(4):
            online.prepare([batch])
            values = online.read(batch.tokens.flat_keys)
            parts = values.split(batch.tokens.num_labels_per_sample)
            self._values |= dict(zip(batch.tokens.flat_keys, parts))

    def read(self, keys):
        return torch.cat([self._values[key] for key in keys])


def teacher() -> Teacher:
    torch.manual_seed(5)
    # A batch for each sample: sums are then the same to the last digit.
    return Teacher(model=type(causal_lm())(text_config()), pad_id=1, tokens_per_batch=1)


def made(reference, **knobs) -> tuple[torch.nn.Module, LoopRegate]:
    model = causal_lm()
    return model, attach(model, config(**knobs), total_steps=6, reference=reference)


@pytest.mark.parametrize("knobs", [{}, {"warmup": 2, "final_dense_share": 0.2}])
@pytest.mark.parametrize("index", [INDEX, None], ids=["indexed", "stream"])
def test_plans_and_difficulty_are_those_of_a_run_with_a_store(knobs: dict, index):
    outcomes = []
    for reference in (teacher().online(index), Stored(INDEX, teacher().online())):
        model, regate = made(reference, **knobs)
        kept = run(regate, model, LOADER, engine(num_micro=2))
        difficulty = regate._opened.difficulty
        difficulty.admit([batch.tokens for batch in batches(4)])
        outcomes.append((kept, read_difficulty(difficulty, INDEX.keys)))
    (mine, m), (theirs, m_theirs) = outcomes
    assert len(mine) == 12
    assert all(
        torch.equal(a.label_position_L, b.label_position_L)
        for a, b in zip(mine, theirs, strict=True)
    )
    assert bool(m.any())
    assert torch.equal(m, m_theirs)


def test_a_window_is_scored_while_the_one_before_is_still_to_be_trained_on():
    scored: list[int] = []
    online = teacher().online(INDEX)

    def read(batch: Batch):
        scored.append(batch.inputs["input_ids"].shape[1])
        return samples_of(batch, [])

    online._read = read
    model, regate = made(online, final_dense_share=0.34)
    seen = []
    for window in regate.windows(LOADER, engine(num_micro=2)):
        seen.append(len(scored))
        for inputs in window:
            regate.loss(model(**inputs))
        regate.step(applied=True)
    # Two micro-batches each of the steps 0 and 1, then one step ahead; the last two are dense.
    assert seen == [4, 6, 8, 8, 8, 8]


def test_what_the_teacher_took_is_told_for_each_step():
    model, regate = made(teacher().online(INDEX), warmup=1, final_dense_share=0.17)
    seconds = []
    for window in regate.windows(LOADER, engine(num_micro=2)):
        for inputs in window:
            regate.loss(model(**inputs))
        regate.step(applied=True)
        seconds.append(regate.metrics()["teacher_seconds"])
    assert [x > 0 for x in seconds] == [False, True, True, True, True, False]
    model, regate = made(Stored(INDEX, teacher().online()))
    run(regate, model, LOADER[:2], engine(num_micro=2))
    assert "teacher_seconds" not in regate.metrics()


def augmented(loader: list[Batch], shift: int) -> list[Batch]:
    """The same samples with other answers, or with one more position before them."""
    changed = []
    for batch in loader:
        labels_BT, segment_BT = batch.tokens.labels_BT.clone(), batch.tokens.segment_BT
        ids_BT = batch.inputs["input_ids"]
        if shift:
            ids_BT = torch.cat([ids_BT[:, :shift], ids_BT], dim=1)
            labels_BT = torch.cat([torch.full_like(labels_BT[:, :shift], -100), labels_BT], dim=1)
            segment_BT = torch.cat([segment_BT[:, :shift], segment_BT], dim=1)
        else:
            labels_BT[batch.tokens.is_label_BT] += 1
        tokens = TokenBatch(batch.tokens.keys, segment_BT, labels_BT)
        changed.append(Batch({"input_ids": ids_BT}, tokens))
    return changed


@pytest.mark.parametrize("shift", [0, 1], ids=["labels", "positions"])
def test_augmentation_is_refused_by_a_store_and_taken_online(shift: int):
    loader = [*batches(4)[:2], *augmented(batches(4)[:2], shift)]
    model, regate = made(Stored(INDEX, teacher().online()))
    with pytest.raises(ValueError, match=r"in the reference store; .*teacher\.mode=online"):
        run(regate, model, loader, engine(num_micro=2))
    model, regate = made(teacher().online())
    assert len(run(regate, model, loader, engine(num_micro=2))) == 4


def test_a_stream_resumed_goes_on_as_if_never_stopped(tmp_path: Path):
    model, whole = made(teacher().online())
    expected = run(whole, model, LOADER, engine(num_micro=2))
    model, begun = made(teacher().online())
    run(begun, model, LOADER[:6], engine(num_micro=2))
    begun.save(tmp_path)
    model, resumed = made(teacher().online())
    resumed.load(tmp_path)
    found = run(resumed, model, LOADER[6:], engine(num_micro=2))
    assert len(found) == 6
    assert all(
        torch.equal(a.label_position_L, b.label_position_L)
        for a, b in zip(found, expected[6:], strict=True)
    )


def test_a_dense_run_needs_no_score():
    online = teacher().online()
    online._score = None  # type: ignore[assignment]
    model, regate = made(online, keep_share=1.0)
    run(regate, model, LOADER, engine(num_micro=2))
    assert "teacher_seconds" not in regate.metrics()


def test_a_teacher_of_the_students_own_weights_is_refused():
    model = causal_lm()
    shared = replace(teacher(), model=model).online()
    with pytest.raises(ValueError, match="is the student's own .* give the teacher a copy"):
        attach(model, config(), reference=shared)
