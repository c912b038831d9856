"""A plan on the wire, and as each rank reads it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from regate_ds.adapters import plan_wire as wire
from regate_ds.adapters.megatron.carrier import by_name
from regate_ds.adapters.megatron.communicator import micro_order
from regate_ds.adapters.megatron.groups import row_multiple
from regate_ds.adapters.megatron.local.bounds import require_same_samples
from regate_ds.adapters.megatron.local.place import Place, require_cut
from regate_ds.adapters.megatron.local.plan import localise
from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.counts import COUNTS
from regate_ds.algorithm.plan import ElisionPlan, StepPlan, plan_dense, plan_loss
from regate_ds.parallel.resharding import SequenceCut
from tests.adapters.megatron.cases_helper import filled_up
from tests.support.batches import random_batch
from tests.support.planning import plan_in, plan_ragged, plan_sparse


def plans(rows: list[list[int]], *, dense: bool = False, multiple: int = 1) -> list[ElisionPlan]:
    made = []
    for seed in range(3):
        _, batch = random_batch(rows, seed=seed, length=32)
        scores = torch.rand(
            int(batch.is_label_BT.sum()), generator=torch.Generator().manual_seed(1)
        )
        made.append(
            plan_dense(batch)
            if dense
            else plan_sparse(
                batch, scores, keep_share=0.5, align="predictor", token_multiple=multiple
            )
        )
    return made


def step_of(micro: list[ElisionPlan], *, dense: bool = False) -> StepPlan:
    """The plan of step 5; every count is another number."""
    counts = {name: 1000 + number for number, name in enumerate(COUNTS)}
    return StepPlan(5, dense, tuple(micro), 77, counts)


def require_same_plan(mine: ElisionPlan, theirs: ElisionPlan) -> None:
    assert (mine.is_packed, mine.moves_rows) == (theirs.is_packed, theirs.moves_rows)
    assert (mine.num_tokens, mine.num_filled) == (theirs.num_tokens, theirs.num_filled)
    names = ("kept_BK", "segment_BK", "position_R", "label_slot_L", "label_position_L")
    for name in (*names, "targets_L"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert mine.run_lengths == theirs.run_lengths
    if mine.is_packed:
        assert mine.token_run_lengths == theirs.token_run_lengths
    if theirs.weight_L is None:
        assert mine.weight_L is None
    else:
        assert mine.weight_L is not None
        assert torch.equal(mine.weight_L, theirs.weight_L)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("rows", [[[20], [31]], [[9, 7, 12]]])
def test_what_arrives_is_what_was_sent(rows: list[list[int]], weighed: bool, dense: bool):
    micro = plans(rows, dense=dense, multiple=4)
    if weighed:
        micro = [replace(plan, weight_L=torch.rand(plan.num_targets)) for plan in micro]
    sent = step_of(micro, dense=dense)
    header, array = wire.encode(sent)
    assert wire.array_length(header) == len(array)
    received = wire.decode(header, array)
    for name in ("step", "is_dense", "num_targets_global", "counts"):
        assert getattr(received, name) == getattr(sent, name), name
    for number, (mine, theirs) in enumerate(zip(received.micro, sent.micro, strict=True)):
        assert (mine.step, mine.micro) == (5, number)
        require_same_plan(mine, theirs)


def test_a_plan_that_chooses_targets_alone_arrives_with_these_alone():
    _, batch = random_batch([[20], [31]], seed=0, length=32)
    is_target_BT = batch.is_label_BT & (torch.arange(32) % 2 == 0)
    plan = plan_loss(batch, is_target_BT)
    assert 0 < plan.num_targets < int(batch.is_label_BT.sum())
    (arrived,) = wire.decode(*wire.encode(step_of([plan]))).micro
    require_same_plan(arrived, plan)


def test_a_failure_is_heard_by_all():
    with pytest.raises(RuntimeError, match="has failed"):
        wire.array_length(torch.full((wire.HEADER,), wire._FAILED))


@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_ranks_together_hold_each_kept_row_and_each_target_once(context: int, tensor: int):
    for plan in plans([[20], [31]], multiple=8):
        locals_ = [
            localise(
                plan,
                Place(context_size=context, context_rank=c, sequence_size=tensor, sequence_rank=t),
            )
            for c in range(context)
            for t in range(tensor)
        ]
        assert sum(len(local.gather.placed_N) for local in locals_) == plan.num_kept
        assert sum(local.num_targets for local in locals_[::tensor]) == plan.num_targets
        for local in locals_:
            assert len(local.targets_P) % tensor == 0


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (2, 2)])
def test_every_rank_holds_a_multiple_of_what_fp8_wants_filled_with_real_tokens(
    context: int, tensor: int, ragged: bool
):
    _, batch = random_batch([[300], [310]], seed=0, length=320)
    scores = torch.rand(int(batch.is_label_BT.sum()))
    place = Place(context_size=context, sequence_size=tensor, ragged=ragged, row_multiple=16)
    planned = plan_ragged if ragged else plan_sparse
    bare = planned(batch, scores, keep_share=0.5, align="predictor")
    plan = plan_in(place.rows, batch, scores, keep_share=0.5, align="predictor")
    assert place.rows.multiple == 16 * context * tensor
    shapes = {
        localise(plan, replace(place, context_rank=c, sequence_rank=t)).kept_shape
        for c in range(context)
        for t in range(tensor)
    }
    ((length, _),) = shapes
    assert length % 16 == 0
    # Filled, not padded, beyond what rows of different lengths need anyway.
    assert plan.num_filled == plan.num_kept - bare.num_kept > 0
    rows, multiple = (plan.segment_BK >= 0).sum(1).tolist(), place.rows.multiple
    if ragged:
        # Context ranks cut each sample, which is filled for that; the end is padding then.
        assert context == 1 or all(n % 4 == 0 for n in rows)
        rows, multiple = [sum(rows)], 4 if context > 1 else multiple
    assert all(n % multiple == 0 for n in rows)


@pytest.mark.parametrize("tensor", [1, 2])
def test_context_ranks_hold_both_ends_of_every_sample_of_ragged_rows(tensor: int):
    plan = plans([[20], [31], [5]])[0]
    place = Place(context_size=2, sequence_size=tensor, ragged=True)
    local = localise(plan, place)
    assert local.packing is not None
    lengths = local.packing.cumulative.diff().tolist()
    kept = (plan.segment_BK >= 0).sum(1).tolist()
    assert all(n % 4 == 0 for n in lengths)
    assert [padded - n < 4 for padded, n in zip(lengths, kept)] == [True] * 3
    assert sum(lengths) % (4 * tensor) == 0
    assert place.rows.num_padding(plan) == sum(lengths) - sum(kept)
    positions = local.rotary_position[:, 0]
    starts = [0, *accumulate(lengths)][:3]
    for row, (start, num) in enumerate(zip(starts, kept, strict=True)):
        assert torch.equal(positions[start : start + num], plan.kept_BK[row, :num])
    first, second = SequenceCut(2).held(*lengths)
    for start, length in zip(starts, lengths):
        whole = torch.arange(start, start + length).chunk(4)
        assert set(torch.cat([whole[0], whole[3]]).tolist()) <= set(first.tolist())
        assert set(torch.cat([whole[1], whole[2]]).tolist()) <= set(second.tolist())


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("context", [1, 2])
def test_a_micro_batch_of_padding_alone_is_planned_and_arrives(ragged: bool, context: int):
    nothing = torch.full((2, 16), -1)
    batch = TokenBatch(((), ()), nothing, torch.full((2, 16), IGNORE))
    place = Place(context_size=context, ragged=ragged)
    plan = plan_in(place.rows, batch, torch.zeros(0), keep_share=0.5, align="predictor")
    (arrived,) = wire.decode(*wire.encode(step_of([plan]))).micro
    local = localise(arrived, place)
    assert (plan.num_kept, local.num_targets) == (0, 0)
    assert local.kept_shape[0] * context >= place.rows.multiple == (4 if context > 1 else 1)
    assert local.padding_BK is not None
    assert bool(local.padding_BK.all())


@pytest.mark.parametrize(
    ("settings", "multiple"),
    [
        ({}, 1),
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, 16),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, 32),
        ({"fp4": "e2m1", "fp4_recipe": "nvfp4"}, 32),
    ],
)
def test_the_multiple_is_read_off_the_hosts_precision(settings: dict[str, str], multiple: int):
    found = row_multiple(SimpleNamespace(**settings))
    assert found % multiple == 0
    assert (found == 1) == (multiple == 1)


def test_rows_of_several_samples_need_thd():
    _, batch = random_batch([[9, 7, 12]], seed=0, length=32)
    with pytest.raises(ValueError, match="row_format='ragged'"):
        require_cut([batch], Place())
    require_cut([batch], Place(ragged=True))
    what = r"sample \('set', 1\) starts at position 9 .* fill each up to a multiple of 4"
    with pytest.raises(ValueError, match=what):
        require_cut([batch], Place(ragged=True, context_size=2))


@pytest.mark.parametrize("dense", [False, True])
def test_context_ranks_cut_each_sample_of_a_packed_row(dense: bool):
    ids, batch = random_batch([[9, 7, 10]], seed=0)
    _, batch = filled_up(ids, batch, 4, 40)
    places = [Place(ragged=True, context_size=2, context_rank=rank) for rank in range(2)]
    require_cut([batch], places[0])
    scores = torch.rand(int(batch.is_label_BT.sum()))
    plan = plan_dense(batch)
    if not dense:
        plan = plan_sparse(batch, scores, keep_share=0.5, align="predictor", token_multiple=1)
    sent = wire.decode(*wire.encode(step_of([plan], dense=dense))).micro[0]
    local = [localise(sent, place) for place in places]
    assert [one.cut for one in local] == [(12, 8, 12, 8)] * 2
    bounds = [0, 12, 20, 32, 40]
    hold = partial(require_same_samples, sent, has_mask=False, looks=True, cut=local[0].cut)
    hold(packed([0, 9, 16, 26, 34], padded=[*bounds, 40]))
    # The row's rest is cut by itself; the last sample does not reach into it.
    for bad in ([0, 12, 20, 40], [0, 12, 20, 32], [0, 12, 24, 32, 40]):
        with pytest.raises(ValueError, match=r"by the plan are \[0, 12, 20, 32, 40\]"):
            hold(packed(bad))
    # Zigzag, worked out by hand: chunks of 3, 2, 3 and 2 rows.
    first = [0, 1, 2, 9, 10, 11, 12, 13, 18, 19, 20, 21, 22, 29, 30, 31, 32, 33, 38, 39]
    held = [first, [t for t in range(40) if t not in first]]
    targets = dict(zip(sent.label_position_L.tolist(), sent.targets_L.tolist(), strict=True))
    for rank, one in enumerate(local):
        if one.gather is not None:
            mine = [t for t in sent.position_R.tolist() if t in held[rank]]
            assert sorted(held[rank][row] for row in one.gather.sent_N.tolist()) == mine
        else:
            mine = [t for t in targets if t in held[rank]]
            assert [held[rank][row] for row in one.head.sent_N.tolist()] == mine
            assert one.targets_P[: one.num_targets].tolist() == [targets[t] for t in mine]


def test_without_interleaving_micro_batches_arrive_in_order():
    assert micro_order(3, 1, 2, 1, 2) == ([0, 1, 2], [0, 1, 2])


def test_with_interleaving_the_first_stage_hears_nothing_for_its_first_chunk():
    arriving, returning = micro_order(4, 0, 2, 2, 2)
    assert arriving == [0, 1, 2, 3]
    assert returning == [0, 1, 0, 1, 2, 3, 2, 3]


class OnDevice(list):
    """Bounds that are not in CPU memory; reading them is noted."""

    is_cpu = False
    reads = 0

    def tolist(self) -> list[int]:
        self.reads += 1
        return list(self)


def packed(bounds: list[int], padded: list[int] | None = None) -> SimpleNamespace:
    given = None if padded is None else OnDevice(padded)
    return SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=OnDevice(bounds), cu_seqlens_q_padded=given
    )


def test_the_bounds_of_a_rows_samples_are_those_that_it_lies_at():
    (plan, *_) = plans([[9, 7, 12]])
    hold = partial(require_same_samples, plan, has_mask=False, looks=True)
    for good in ([0, 9, 16, 28], [0, 9, 16, 28, 32]):
        hold(packed(good))
        # The host's own samples are shorter where it fills each one up.
        hold(packed([0, 8, 13, 24], padded=good))
    for bad in ([0, 16, 28], [0, 9, 12, 16, 28], [0, 8, 16, 28]):
        with pytest.raises(ValueError, match=r"bounds .* those of the plan start at \[0, 9, 16\]"):
            hold(packed(bad))
        with pytest.raises(ValueError, match="bounds .* those of the plan start at"):
            hold(packed([0, 9, 16, 28], padded=bad))


def test_bounds_on_a_device_are_read_where_their_number_does_not_tell():
    (plan, *_) = plans([[9, 7, 12]])
    hold = partial(require_same_samples, plan, has_mask=False, looks=False)
    counted = packed([0, 9, 16, 28])
    hold(counted)
    assert counted.cu_seqlens_q.reads == 0
    # As hosts fill them up to a fixed length.
    hold(packed([0, 9, 16, 28, 32, 32, 32]))
    with pytest.raises(ValueError, match=r"bounds \[0, 16, 28\]"):
        hold(packed([0, 16, 28]))


def test_a_model_call_is_repeated_argument_by_argument():
    class Model:
        def forward(self, ids: int, mask: int = 0, *, labels: int = 0, **more: int) -> None: ...

    found = by_name(signature(Model.forward), Model(), (1,), {"labels": 3, "extra": 4})
    assert found == {"ids": 1, "labels": 3, "extra": 4}
