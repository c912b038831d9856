"""Estimate a run on thousands of ranks in one process: groups, plans, shapes and bytes.

    python -m regate_ds.recipe.estimate.megatron_world [--all]

It needs no device: torch's fake process group stands in for the network, and meta tensors for
activations. Megatron makes the groups; the library's own code exchanges plans and moves rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch.testing._internal.distributed.fake_pg import FakeStore

from regate_ds.adapters.megatron.groups import Axes, Table, find_axes
from regate_ds.adapters.megatron.local.place import Place
from regate_ds.adapters.megatron.local.plan import LocalPlan, localise
from regate_ds.adapters.plan_wire import encode
from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.plan import StepPlan
from regate_ds.config import RegateConfig
from regate_ds.parallel.layout import replicas
from regate_ds.parallel.resharding import SequenceCut, move_rows
from regate_ds.recipe.estimate.unseen import in_reading_order, plan_unseen


@dataclass(frozen=True, kw_only=True)
class World:
    """Sizes of the imagined run. It has sequence parallelism, rows of one length, first_layer 1."""

    tensor: int = 8
    pipeline: int = 8
    context: int = 2
    data: int = 32
    num_micro: int = 8
    num_tokens: int = 4096
    keep_share: float = 0.5
    hidden: int = 8192
    num_bytes: int = 2
    """Bytes of one activation: 2 is bf16."""

    num_answer_tokens: int = 1_000_000_000
    """Answer tokens of the data set; the stores hold a value for each."""

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def cut(self) -> SequenceCut:
        return SequenceCut(self.context, self.tensor)


@dataclass(frozen=True)
class RankRow:
    """What one rank holds and moves in an optimizer step."""

    rank: int
    tensor: int
    context: int
    stage: int
    data: int
    kept_rows: int
    """Rows of kept tokens on this rank, summed over micro-batches."""

    plan_bytes: int
    gather_bytes: int
    """Bytes of rows that move to another rank of the sequence when the kept rows are cut anew."""

    p2p_bytes: int
    store_bytes: int


def ranks_of(world: World) -> list[tuple[int, int, int, int]]:
    """Return (tensor, context, stage, data) of each rank, in Megatron's default order."""
    generator = mpu.RankGenerator(
        tp=world.tensor,
        ep=1,
        dp=world.data,
        pp=world.pipeline,
        cp=world.context,
        order="tp-cp-ep-dp-pp",
    )
    places = [[0, 0, 0, 0] for _ in range(world.size)]
    for axis, name in enumerate(("tp", "cp", "pp", "dp")):
        for group in generator.get_ranks(name):
            for number, rank in enumerate(group):
                places[rank][axis] = number
    return [(p[0], p[1], p[2], p[3]) for p in places]


def plan_of(world: World, data_rank: int) -> StepPlan:
    """Plan one replica's micro-batches of random samples."""
    generator = torch.Generator().manual_seed(data_rank)
    window = [_random_batch(world, number, generator) for number in range(world.num_micro)]
    config = RegateConfig(keep_share=world.keep_share)
    reference_N = torch.rand(sum(b.num_labels for b in window), generator=generator)
    rows = world.cut.row_layout("padded", 1)
    _, micro = plan_unseen(config, window, reference_N, rows, in_reading_order)
    return StepPlan(0, False, micro, sum(plan.num_targets for plan in micro), {})


def _random_batch(world: World, number: int, generator: torch.Generator) -> TokenBatch:
    low, high = world.num_tokens // 4, world.num_tokens // 2
    prompt = int(torch.randint(low, high, (), generator=generator))
    labels = torch.randint(100, (1, world.num_tokens), generator=generator)
    labels[:, :prompt] = labels[:, -1:] = IGNORE
    return TokenBatch(((("set", number),),), torch.zeros_like(labels), labels)


def rows_of(world: World) -> list[RankRow]:
    """Return one row for each rank, computed from the plans alone."""
    places, rows = ranks_of(world), []
    for data_rank in range(world.data):
        plan = plan_of(world, data_rank)
        header, array = encode(plan)
        plan_bytes = 8 * len(header) + 4 * len(array)
        shares = {
            (tensor, context): [
                localise(micro, _place(world, tensor, context)) for micro in plan.micro
            ]
            for tensor in range(world.tensor)
            for context in range(world.context)
        }
        rows += [
            _row(world, rank, place, shares[place[0], place[1]], plan_bytes)
            for rank, place in enumerate(places)
            if place[3] == data_rank
        ]
    return sorted(rows, key=lambda row: row.rank)


def _place(world: World, tensor: int, context: int) -> Place:
    return Place(
        context_size=world.context,
        context_rank=context,
        sequence_size=world.tensor,
        sequence_rank=tensor,
    )


def _row(
    world: World,
    rank: int,
    place: tuple[int, int, int, int],
    micro: list[LocalPlan],
    plan_bytes: int,
) -> RankRow:
    tensor, context, stage, data = place
    row_bytes = world.hidden * world.num_bytes
    kept = sum(local.kept_shape[0] for local in micro)
    part = context * world.tensor + tensor
    crossing = sum(local.gather.num_crossing(part) for local in micro if local.gather is not None)
    is_last = stage == world.pipeline - 1
    # All stages but the last send activations onward; all but the first send gradients back.
    transfers = (not is_last) + (stage > 0)
    is_planner = is_last and tensor == 0 and context == 0
    # The fp16 reference is mapped from disk; each data rank has its share of fp32 difficulty.
    stores = 2 * world.num_answer_tokens + 4 * world.num_answer_tokens // world.data
    return RankRow(
        rank=rank,
        tensor=tensor,
        context=context,
        stage=stage,
        data=data,
        kept_rows=kept,
        plan_bytes=plan_bytes,
        gather_bytes=crossing * row_bytes * (stage == 0),
        p2p_bytes=transfers * kept * row_bytes,
        store_bytes=stores * is_planner,
    )


@contextmanager
def joined(world: World, rank: int) -> Iterator[Axes]:
    """Make Megatron's groups and ours as ``rank`` of the world sees them, over a fake network."""
    places = ranks_of(world)
    table: Table = [(data, (t, c, s) == (0, 0, world.pipeline - 1)) for t, c, s, data in places]
    dist.init_process_group("fake", rank=rank, world_size=world.size, store=FakeStore())
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=world.tensor,
            pipeline_model_parallel_size=world.pipeline,
            context_parallel_size=world.context,
            create_gloo_process_groups=False,
        )
        found = (
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_context_parallel_rank(),
            mpu.get_pipeline_model_parallel_rank(),
            mpu.get_data_parallel_rank(),
        )
        assert found == places[rank], f"rank {rank} is {found}, expected {places[rank]}"
        config: Any = SimpleNamespace(
            sequence_parallel=True, tensor_model_parallel_size=world.tensor
        )
        yield find_axes(config, ragged=False, ends_early=False, token_multiple=1, table=table)
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def exchange_plans(world: World, axes: Axes) -> tuple[int, ...]:
    """Send the plan as the planner would, move meta rows by it, and return their shape."""
    sent = axes.replica.share(partial(plan_of, world, mpu.get_data_parallel_rank()))
    local = localise(sent.micro[0], axes.place).to("meta")
    assert local.gather is not None
    full = torch.empty(*local.full_shape, world.hidden, dtype=torch.bfloat16, device="meta")
    return tuple(move_rows(full, local.gather, local.kept_shape, axes.split).shape)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="print every rank, not a choice")
    world, start = World(), time.monotonic()
    every = parser.parse_args().all
    rows = rows_of(world)
    groups = replicas([data for *_, data in ranks_of(world)])
    planner = next(row.rank for row in rows if row.store_bytes)
    with joined(world, planner) as axes:
        shape = exchange_plans(world, axes)
    names = [field.name for field in fields(RankRow)]
    print(" ".join(f"{name:>13}" for name in names))
    for row in rows:
        if every or (row.data in (0, world.data - 1) and row.tensor == 0):
            print(" ".join(f"{getattr(row, name):>13,}" for name in names))
    print(f"{world.size:,} ranks, {len(groups)} replicas of {len(groups[0])}; kept rows of a")
    print(f"micro-batch at rank {planner}: {shape}; {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
