"""Executions: the plans they make, against what their line in the contract says."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from regate_ds.algorithm.batch import ELIDABLE, IGNORE, IMAGE
from regate_ds.algorithm.executions.backward_only import BackwardOnly
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.elide_images import ElideImages
from regate_ds.algorithm.executions.execution import Ranked, Span, gated_span
from regate_ds.algorithm.executions.loss_only import LossOnly
from regate_ds.algorithm.executions.mlp_only import MlpOnly
from regate_ds.algorithm.executions.none import NoElision
from regate_ds.algorithm.executions.table import EXECUTIONS, SUPPORTED, require_execution
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.rows import RowLayout
from regate_ds.config import RegateConfig
from tests.algorithm.plain_plan_helper import plain_ragged, rows_of, wild_batch


def wild(rng: random.Random, *, images: bool = False):
    batch = wild_batch(rng, images=images)
    score_BT = torch.rand(batch.labels_BT.shape, dtype=torch.float64)
    is_elidable_BT = batch.kind_BT == ELIDABLE
    num_S = torch.bincount(batch.sample_BT[is_elidable_BT], minlength=len(batch.flat_keys))
    num_hard_S = torch.div(num_S + 1, 2, rounding_mode="floor")
    return batch, Ranked(score_BT=score_BT, num_hard_S=num_hard_S)


def test_loss_only_moves_no_row_and_has_a_loss_where_elision_keeps_labels():
    rng = random.Random(0)
    for _ in range(40):
        batch, ranked = wild(rng)
        chosen = LossOnly().plan(batch, ranked, RowLayout(multiple=8))
        elided = Elide().plan(batch, ranked, RowLayout())
        assert not chosen.moves_rows
        assert torch.equal(chosen.kept_BK[0], torch.arange(batch.labels_BT.shape[1]))
        assert torch.equal(chosen.label_position_L, elided.label_position_L)
        assert torch.equal(chosen.targets_L, elided.targets_L)


def test_no_elision_keeps_every_position_and_every_label():
    rng = random.Random(1)
    for _ in range(20):
        batch, ranked = wild(rng)
        plan = NoElision().plan(batch, ranked, RowLayout())
        assert not plan.moves_rows
        assert plan.num_targets == int(batch.is_label_BT.sum())
        assert [len(row) for row in rows_of(plan)] == (batch.segment_BT >= 0).sum(1).tolist()


@pytest.mark.parametrize("align", ["predictor", "target", "both"])
def test_mlp_only_keeps_what_lists_say_and_fills_the_micro_batch_as_a_whole(align: Any):
    rng = random.Random(3)
    for multiple in (1, 8) * 15:
        batch, ranked = wild(rng)
        plan = MlpOnly(align=align).plan(batch, ranked, rows_of_mlp_only(multiple))
        score_N = ranked.score_BT[batch.is_label_BT]
        kept, num_filled = plain_ragged(
            batch, score_N, keep_share=0.5, align=align, multiple=multiple
        )
        num_tokens, labels = plan.num_tokens, batch.labels_BT.flatten().tolist()
        flat = [r * num_tokens + t for r, row in enumerate(kept) for t in row]
        targets = [t for t in flat if labels[t] != IGNORE]
        assert plan.moves_rows
        assert (rows_of(plan), plan.num_filled) == (kept, num_filled)
        assert plan.position_R.tolist() == flat
        assert plan.label_position_L.tolist() == targets
        assert plan.targets_L.tolist() == [labels[t] for t in targets]


@pytest.mark.parametrize("align", ["predictor", "target", "both"])
def test_backward_only_keeps_what_elide_does_and_asks_for_every_label(align: Any):
    rng = random.Random(4)
    for multiple in (1, 8) * 10:
        batch, ranked = wild(rng)
        rows = RegateConfig(execution=BackwardOnly(), token_multiple=multiple).rows
        found = BackwardOnly(align=align).plan(batch, ranked, rows)
        elided = Elide(align=align).plan(batch, ranked, RowLayout(multiple=multiple))
        labels = batch.labels_BT.flatten().tolist()
        targets = [t for t, label in enumerate(labels) if label != IGNORE]
        assert (rows_of(found), found.num_filled) == (rows_of(elided), elided.num_filled)
        assert found.moves_rows
        assert found.label_position_L.tolist() == targets
        assert found.targets_L.tolist() == [labels[t] for t in targets]
        assert found.num_targets == len(targets)


def test_elide_images_leaves_out_image_tokens_alone_and_has_the_loss_of_loss_only():
    rng = random.Random(5)
    for multiple in (1, 8) * 15:
        batch, ranked = wild(rng, images=True)
        assert batch.image_BT is not None
        is_image_BT = batch.kind_BT == IMAGE
        place_BT = torch.randint(-3, 4, batch.labels_BT.shape)
        ranked = replace(ranked, beyond_BT=place_BT)
        plan = ElideImages().plan(batch, ranked, RowLayout(multiple=multiple))
        losses = LossOnly().plan(batch, ranked, RowLayout())
        for row, found in enumerate(rows_of(plan)):
            real = (batch.segment_BT[row] >= 0).nonzero().flatten().tolist()
            others = [t for t in real if not is_image_BT[row, t]]
            images = [t for t in real if is_image_BT[row, t]]
            first = [t for t in images if place_BT[row, t] < 0]
            assert set(others + first) <= set(found) <= set(others + images)
            assert len(found) - len(others + first) <= plan.num_filled
        if multiple == 1:
            assert plan.num_filled == 0
        assert plan.moves_rows
        assert torch.equal(plan.label_position_L, losses.label_position_L)
        assert torch.equal(plan.targets_L, losses.targets_L)
        assert torch.equal(plan.position_R[_slots_of(plan)], plan.label_position_L)


def test_elide_images_moves_no_row_where_the_step_keeps_every_image_token():
    batch, ranked = wild(random.Random(6), images=True)
    plan = ElideImages().plan(batch, ranked, RowLayout(multiple=8))
    losses = LossOnly().plan(batch, ranked, RowLayout())
    assert not plan.moves_rows
    assert torch.equal(plan.kept_BK, losses.kept_BK)
    assert torch.equal(plan.label_position_L, losses.label_position_L)


def _slots_of(plan: ElisionPlan) -> torch.Tensor:
    """The real slots that predict, as indices into those of the plan."""
    index_R = torch.full((plan.kept_BK.numel(),), -1)
    index_R[plan.slot_R] = torch.arange(plan.num_kept)
    return index_R[plan.label_slot_L]


def rows_of_mlp_only(multiple: int) -> RowLayout:
    return RegateConfig(execution=MlpOnly(), token_multiple=multiple).rows


def test_spans_are_the_gated_range():
    assert Elide().spans(1, 4) == (Span(first=1, last=4, part="layer", kept_set=0),)
    assert ElideImages().spans(1, 4) == Elide().spans(1, 4)
    assert MlpOnly().spans(1, 4) == (Span(first=1, last=4, part="mlp", kept_set=0),)
    assert BackwardOnly().spans(1, 4) == (Span(first=1, last=4, part="backward", kept_set=0),)
    assert LossOnly().spans(1, 4) == NoElision().spans(1, 4) == ()


def test_a_host_is_given_spans_of_the_parts_that_it_can_gate():
    mlp, layer = MlpOnly().spans(1, 4), Elide().spans(1, 4)
    assert gated_span(layer) == layer[0]
    assert gated_span(()) is None
    assert gated_span(mlp, ("layer", "mlp")) == mlp[0]
    for spans in (mlp, layer + layer):
        with pytest.raises(
            ValueError, match=r"one span, of a part of \('layer',\); choose another"
        ):
            gated_span(spans)


@pytest.mark.parametrize("host", ["deepspeed_pipeline", "megatron"])
@pytest.mark.parametrize("name", ["mlp_only", "backward_only", "random_ltd"])
def test_hosts_that_cannot_gate_a_part_refuse_it_by_name(host: str, name: str):
    require_execution(EXECUTIONS[name](), "huggingface")
    with pytest.raises(ValueError, match=f"execution={name} is not supported under {host}"):
        require_execution(EXECUTIONS[name](), host)


def test_what_a_host_does_not_carry_out_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(SUPPORTED, "megatron", ("elide",))
    require_execution(Elide(), "megatron")
    with pytest.raises(ValueError, match=r"execution=loss_only is not supported under megatron"):
        require_execution(LossOnly(), "megatron")


def test_every_host_names_executions_that_there_are():
    assert all(set(names) <= set(EXECUTIONS) for names in SUPPORTED.values())


@pytest.mark.parametrize("sample_multiple", [1, 4])
def test_ragged_rows_are_padded_as_a_walk_over_samples_says(sample_multiple: int):
    rng = random.Random(2)
    rows = RowLayout(row_format="ragged", multiple=8, sample_multiple=sample_multiple)
    for _ in range(30):
        batch, ranked = wild(rng)
        plan = Elide().plan(batch, ranked, rows)
        lengths = [n + -n % sample_multiple for n in plan.sample_lengths.tolist()]
        total = sum(lengths) + -sum(lengths) % 8
        assert rows.num_padding(plan) == total - plan.num_kept
