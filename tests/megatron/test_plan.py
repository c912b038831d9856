"""A plan on the wire, and as each rank reads it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from regate_ds.adapters import plan_wire as wire
from regate_ds.adapters.megatron.communicator import micro_order
from regate_ds.adapters.megatron.local_plan import Place, localise, require_cut
from regate_ds.algorithm.select import ElisionPlan, plan_dense, plan_sparse
from tests.batches import random_batch


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


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rows", [[[20], [31]], [[9, 7, 12]]])
def test_what_arrives_is_what_was_sent(rows: list[list[int]], dense: bool):
    sent = plans(rows, dense=dense)
    header, array = wire.encode(5, dense, sent)
    assert wire.array_length(header) == len(array)
    received = wire.decode(header, array)
    assert (received.step, received.is_dense) == (5, dense)
    for micro, (mine, theirs) in enumerate(zip(received.micro, sent, strict=True)):
        assert (mine.micro, mine.is_packed) == (micro, theirs.is_packed)
        for name in ("kept_BK", "labels_BK", "position_R", "label_slot_L", "label_position_L"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert mine.run_lengths == theirs.run_lengths


def test_a_failure_is_heard_by_all():
    with pytest.raises(RuntimeError, match="could not plan"):
        wire.array_length(wire.FAILURE)


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


def test_rows_of_several_samples_need_thd():
    with pytest.raises(ValueError, match="layout='thd'"):
        require_cut(plans([[9, 7, 12]]), Place())
    require_cut(plans([[9, 7, 12]]), Place(ragged=True))


def test_without_interleaving_micro_batches_arrive_in_order():
    assert micro_order(3, 1, 2, 1, 2) == ([0, 1, 2], [0, 1, 2])


def test_with_interleaving_the_first_stage_hears_nothing_for_its_first_chunk():
    arriving, returning = micro_order(4, 0, 2, 2, 2)
    assert arriving == [0, 1, 2, 3]
    assert returning == [0, 1, 0, 1, 2, 3, 2, 3]
