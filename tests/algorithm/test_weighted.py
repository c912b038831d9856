"""Weights of the loss against walks over lists, and the steps that use them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from regate_ds.algorithm.executions.execution import Ranked
from regate_ds.algorithm.executions.weighted import Weighted
from regate_ds.algorithm.quotas.per_window import PerWindow
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.scores.random import Random
from regate_ds.algorithm.scores.reference import ReferenceOnly
from regate_ds.config import RegateConfig
from regate_ds.images_config import ImagesConfig
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.session import Regate
from regate_ds.stores.values import Stores
from tests.algorithm.plain_plan_helper import wild_batch
from tests.support.batches import random_batch
from tests.support.stores import RandomReference, index_of


def plain_weights(batch, score_BT, low: float, high: float) -> list[float]:
    """One weight for each label position in reading order, position by position."""
    weights = []
    for row, segments in enumerate(batch.segment_BT.tolist()):
        labels = batch.is_label_BT[row].tolist()
        pooled: dict[int, list[float]] = {}
        for t, segment in enumerate(segments):
            if not labels[t]:
                continue
            near = [u for u in (t - 1, t, t + 1) if 0 <= u < len(labels)]
            near = [u for u in near if labels[u] and segments[u] == segment]
            values = [min(high, max(low, float(score_BT[row, u]))) for u in near]
            pooled.setdefault(segment, []).append(sum(values) / len(values))
        for values in pooled.values():
            weights += [value * len(values) / sum(values) for value in values]
    return weights


def test_weights_are_what_a_walk_over_positions_gives_and_add_up_to_the_count():
    rng = random.Random(5)
    for _ in range(40):
        batch = wild_batch(rng)
        score_BT = 8 * torch.rand(batch.labels_BT.shape, dtype=torch.float64) - 1
        score_BT[rng.random() < 0.5, 0] = torch.inf
        ranked = Ranked(score_BT=score_BT, num_hard_S=torch.zeros(len(batch.flat_keys)).long())
        plan = Weighted(low=0.5, high=4.0).plan(batch, ranked, RowLayout(multiple=8))
        wanted = torch.tensor(plain_weights(batch, score_BT, 0.5, 4.0))
        assert not plan.moves_rows
        assert plan.num_targets == int(batch.is_label_BT.sum())
        assert plan.weight_L is not None
        torch.testing.assert_close(plan.weight_L, wanted.view(-1))
        sample_L = batch.sample_BT.reshape(-1)[plan.label_position_L]
        for sample in sample_L.unique():
            of_sample = plan.weight_L[sample_L == sample]
            assert float(of_sample.sum()) == pytest.approx(len(of_sample), rel=1e-6)


def test_cals_numbers_by_hand():
    """Clamped to 1..5 first, then the mean of neighbours: 1 3 5 -> 2 3 4, over their mean 3."""
    _, batch = random_batch([[12]], seed=0)
    labels_BT = torch.full_like(batch.labels_BT, -100)
    labels_BT[0, 5:8] = 7
    batch = replace(batch, labels_BT=labels_BT)
    score_BT = torch.zeros(batch.labels_BT.shape, dtype=torch.float64)
    score_BT[0, 5:8] = torch.tensor([-2.0, 3.0, 40.0])
    ranked = Ranked(score_BT=score_BT, num_hard_S=torch.tensor([0]))
    plan = Weighted().plan(batch, ranked, RowLayout())
    torch.testing.assert_close(plan.weight_L, torch.tensor([2.0, 3.0, 4.0]) / 3.0)


def test_a_run_weighs_in_sparse_steps_and_counts_every_label_in_all():
    _, batch = random_batch([[20], [13]])
    config = RegateConfig(
        execution=Weighted(),
        score=ReferenceOnly(),
        keep_share=1.0,
        schedule=ScheduleConfig(warmup=1, final_dense_share=0.25),
    )
    reference = RandomReference(index_of([batch]))
    session = Regate(config, Stores(reference), total_steps=4)
    assert config.schedules(4).num_sparse(4) == 2
    assert config.schedules(4).answers.expected_share() == 1.0
    for step in range(4):
        plan = session.plan_step([batch])
        (micro,) = plan.micro
        assert plan.is_dense == (step in (0, 3))
        assert plan.num_targets_global == plan.counts["answer_total"] == micro.num_targets
        assert (micro.weight_L is None) == plan.is_dense
        if micro.weight_L is not None:
            score_BT = batch.at_labels(reference.read(batch.flat_keys))
            wanted = torch.tensor(plain_weights(batch, score_BT, 1.0, 5.0))
            torch.testing.assert_close(micro.weight_L, wanted)
        session.record(micro, torch.ones(micro.num_targets))
        session.finish_step(applied=True)


def test_what_weights_do_not_read_is_refused():
    with pytest.raises(ValueError, match="needs the teacher's losses"):
        Regate(RegateConfig(execution=Weighted(), keep_share=1.0), Stores(), total_steps=4)
    with pytest.raises(ValueError, match=r"quota=PerWindow.* is not read by execution=weighted"):
        RegateConfig(execution=Weighted(), keep_share=1.0, quota=PerWindow())
    with pytest.raises(ValueError, match="would elide no image token"):
        RegateConfig(execution=Weighted(), keep_share=1.0, images=ImagesConfig(keep_share=0.5))
    assert not RegateConfig(execution=Weighted(), score=Random(), keep_share=1.0).needs_reference
