"""Random layerwise token dropping: what is drawn, and on what it depends."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.counts import COUNTS, count_step
from regate_ds.algorithm.executions.execution import Ranked, Span, joined_span
from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.rows import RowLayout
from tests.algorithm.plain_plan_helper import rows_of, wild_batch

LAYERS = range(1, 4)


def planned(
    batch: TokenBatch, share: float, *, step: int = 3, seed: int = 0, **rows
) -> ElisionPlan:
    ranked = Ranked(
        score_BT=torch.zeros(batch.labels_BT.shape),
        num_hard_S=torch.zeros(len(batch.flat_keys), dtype=torch.int64),
        step=step,
        keep_share=share,
        layers=LAYERS,
    )
    return RandomLtd(seed=seed).plan(batch, ranked, RowLayout(**rows))


def samples_of(batch: TokenBatch, one: ElisionPlan) -> dict[tuple, list[int]]:
    """Kept places within each sample, by its key."""
    found: dict[tuple, list[int]] = {key: [] for key in batch.flat_keys}
    for row, kept in enumerate(rows_of(one)):
        for t in kept:
            sample = int(batch.segment_BT[row, t])
            first = batch.segment_BT[row].tolist().index(sample)
            found[batch.keys[row][sample]].append(t - first)
    return found


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.5, 1.0])
def test_each_layer_keeps_the_first_token_and_a_share_of_each_sample(share: float):
    rng = random.Random(0)
    for multiple in (1, 8) * 10:
        batch = wild_batch(rng, images=True)
        plan = planned(batch, share, multiple=multiple)
        assert len(plan.sets) == len(LAYERS)
        for one in plan.sets:
            assert one.moves_rows
            assert one.num_slots % multiple == 0
            for (row, sample), kept in zip(
                [(r, s) for r, keys in enumerate(batch.keys) for s in range(len(keys))],
                samples_of(batch, one).values(),
                strict=True,
            ):
                size = int((batch.segment_BT[row] == sample).sum())
                assert len(kept) == math.ceil(share * size - 1e-9)
                assert kept == sorted(set(kept))
                assert 0 == kept[0] <= kept[-1] < size
        labels = batch.labels_BT.flatten().tolist()
        assert plan.label_position_L.tolist() == [t for t, y in enumerate(labels) if y != IGNORE]
        assert plan.targets_L.tolist() == [y for y in labels if y != IGNORE]
        counts = dict(zip(COUNTS, count_step([batch], [plan], lambda one: one.num_padded)))
        assert counts["tokens_kept"] == plan.num_kept == plan.sets[-1].num_kept
        assert counts["answer_kept"] == counts["answer_total"]
        by_hand = [sum(labels[t] != IGNORE for t in one.position_R.tolist()) for one in plan.sets]
        assert counts["answer_entered"] == round(sum(by_hand) / len(LAYERS))


def test_a_sample_has_the_same_draw_wherever_it_lies_and_another_in_each_layer_and_step():
    batch = wild_batch(random.Random(5))
    alone = [
        replace(
            batch,
            keys=(keys,),
            segment_BT=batch.segment_BT[row : row + 1],
            labels_BT=batch.labels_BT[row : row + 1],
        )
        for row, keys in enumerate(batch.keys)
    ]
    together = planned(batch, 0.5)
    for layer in range(len(LAYERS)):
        joined = samples_of(batch, together.sets[layer])
        for one in alone:
            assert samples_of(one, planned(one, 0.5).sets[layer]).items() <= joined.items()
    drawn = [rows_of(one) for one in together.sets]
    drawn += [rows_of(planned(batch, 0.5, step=4).sets[0])]
    drawn += [rows_of(planned(batch, 0.5, seed=1).sets[0])]
    assert all(drawn.count(one) == 1 for one in drawn)


def test_every_other_token_is_kept_equally_often():
    segment = torch.zeros(1, 7, dtype=torch.int64)
    batch = TokenBatch(((("set", 0),),), segment, torch.ones_like(segment))
    found, num_draws = torch.zeros(7), 0
    for step in range(150):
        for one in planned(batch, 0.4, step=step).sets:
            found[one.position_R] += 1
            num_draws += 1
    share = (3 - 1) / 6
    assert found[0] == num_draws
    deviation = math.sqrt(num_draws * share * (1 - share))
    assert (found[1:] - share * num_draws).abs().max() < 4 * deviation


def test_spans_are_layers_with_sets_of_their_own_and_join_to_the_gated_range():
    spans = RandomLtd().spans(1, 3)
    assert spans == (Span(first=1, last=2), Span(first=2, last=3, kept_set=1))
    assert joined_span(spans) == Span(first=1, last=3)
    assert joined_span(spans[:1]) == spans[0]
    assert joined_span(()) is None
    for wrong in (spans[::-1], (spans[0], replace(spans[1], part="mlp"))):
        with pytest.raises(ValueError, match="one span, of a part of"):
            joined_span(wrong)
