"""What a session that an adapter opens remembers, for scores of every kind of need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from regate_ds.adapters.computed import Computed
from regate_ds.adapters.session_state import open_session
from regate_ds.algorithm.rankings.random import RandomOrder
from regate_ds.algorithm.schedule import MovingShare
from regate_ds.algorithm.scores.score import ScoreInputs, Statistic
from regate_ds.algorithm.scores.table import SCORES
from regate_ds.config import RegateConfig
from regate_ds.images_config import ImagesConfig
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.schedule_config import ScheduleConfig
from tests.support.batches import random_batch

_, BATCH = random_batch([[20], [13]])


@dataclass(frozen=True, kw_only=True)
class LastLoss:
    """Remembers the student, and reads no teacher."""

    column = None
    statistics = (Statistic(name="last"),)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        return inputs.statistics["last"]


@pytest.fixture
def config(monkeypatch) -> RegateConfig:
    monkeypatch.setitem(SCORES, "last_loss", LastLoss)
    schedule = ScheduleConfig(warmup=1, final_dense_share=0.0)
    return RegateConfig(score=LastLoss(), schedule=schedule)


def test_a_score_without_reference_remembers_whatever_samples_come(config, tmp_path):
    opened = open_session(config, Computed(), ParallelLayout(), total_steps=2)
    (plan,) = opened.session.plan_step([BATCH]).micro
    losses_L = torch.rand(plan.num_targets)
    opened.session.record(plan, losses_L)
    opened.session.finish_step(applied=True)
    opened.save(tmp_path)
    resumed = open_session(config, Computed(), ParallelLayout(), total_steps=2)
    resumed.load(tmp_path)
    (sparse,) = resumed.session.plan_step([BATCH]).micro
    of_position = dict(zip(plan.label_position_L.tolist(), losses_L.tolist(), strict=True))
    kept = {position: of_position[position] for position in sparse.label_position_L.tolist()}
    for row in range(2):
        here = {p: loss for p, loss in of_position.items() if p // plan.num_tokens == row}
        elided = [loss for p, loss in here.items() if p not in kept]
        assert elided
        assert min(kept[p] for p in here if p in kept) > max(elided)


def test_a_resume_with_other_knobs_says_which(config, tmp_path, caplog):
    opened = open_session(config, Computed(), ParallelLayout(), total_steps=2)
    opened.save(tmp_path)
    for changed, lines in (
        (config, []),
        (replace(config, keep_share=0.4), ["keep_share=0.4, but the checkpoint's run had 0.5"]),
        (
            replace(config, images=ImagesConfig(keep_share=0.25, ranking=RandomOrder(seed=3))),
            ["images.keep_share=0.25", "images.random.seed=3"],
        ),
    ):
        caplog.clear()
        open_session(changed, Computed(), ParallelLayout(), total_steps=2).load(tmp_path)
        found = [record.getMessage() for record in caplog.records]
        assert len(found) == len(lines)
        assert all(line in message for line, message in zip(lines, found, strict=True))


def test_a_resume_with_another_path_of_a_share_says_so(config, tmp_path, caplog):
    falls = MovingShare(points=((0.0, 0.7), (1.0, 0.3)))
    moving = replace(config, keep_share=falls)
    open_session(moving, Computed(), ParallelLayout(), total_steps=2).save(tmp_path)
    for changed, lines in (
        (moving, []),
        (
            replace(moving, keep_share=replace(falls, between="steps")),
            ["keep_share.between=steps, but the checkpoint's run had line"],
        ),
        (config, ["keep_share=0.5, but the checkpoint's run had {'points': [[0.0, 0.7]"]),
    ):
        caplog.clear()
        open_session(changed, Computed(), ParallelLayout(), total_steps=2).load(tmp_path)
        found = [record.getMessage() for record in caplog.records]
        assert len(found) == len(lines)
        assert all(line in message for line, message in zip(lines, found, strict=True))


def test_a_score_that_reads_the_teacher_is_refused_without_one():
    with pytest.raises(ValueError, match="needs the teacher's losses"):
        open_session(RegateConfig(), Computed(), ParallelLayout(), total_steps=2)
