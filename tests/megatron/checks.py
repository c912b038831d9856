"""One optimizer step of a case against the plain reference: losses, gradients, difficulty."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from regate_ds.adapters.megatron import MegatronRegate, attach
from regate_ds.data.difficulty_store import DifficultyStore
from regate_ds.session import Regate, StepPlan
from tests.megatron.build import build, fill, host_config, join, named, shard
from tests.megatron.cases import Case, Item, items
from tests.megatron.llava import ImageItem, PlainVision
from tests.megatron.plain_gpt import PlainModel, balance_loss, batch_losses
from tests.stores import RandomReference, index_of

TOLERANCE = 1e-5


@dataclass
class Report:
    """The largest relative errors that a rank found."""

    loss: float = 0.0
    gradient: float = 0.0


def all_items(case: Case) -> list[list[Item]]:
    return [items(case, data_rank) for data_rank in range(case.dp)]


def reference_of(case: Case) -> RandomReference:
    return RandomReference(index_of(item.tokens for rank in all_items(case) for item in rank))


def forward_step(case: Case) -> Any:
    """A user's forward step: it knows nothing of elision."""

    def step(iterator: Any, model: Any) -> Any:
        ids, packed = None, None
        item = next(iterator)
        ids = cut(item.ids_BT, case.cp)
        if case.packed:
            lengths = item.tokens.segment_BT[0].unique_consecutive(return_counts=True)[1]
            bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
            longest = int(lengths.max())
            packed = PackedSeqParams("thd", bounds, bounds, None, None, longest, longest)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        if isinstance(item, ImageItem):
            output, _ = model(item.images, ids, positions, None)
            return output, None
        output = model(ids, positions, None, labels=ids, packed_seq_params=packed)
        return output, None

    return step


def cut(x_BT: Tensor, context_size: int) -> Tensor:
    """This context rank's zigzag part of rows."""
    if context_size == 1:
        return x_BT
    chunks, rank = x_BT.chunk(2 * context_size, dim=1), mpu.get_context_parallel_rank()
    return torch.cat([chunks[rank], chunks[2 * context_size - 1 - rank]], dim=1)


def run_step(case: Case) -> tuple[MegatronRegate, list[Any]]:
    """Groups, model, and one step of forward and backward passes."""
    join(case)
    chunks = build(case)
    regate = attach(chunks, case.config, reference=reference_of(case), layout=case.layout)
    schedule = regate.wrap(get_forward_backward_func())
    run_chunks(case, chunks, schedule, forward_step(case))
    return regate, chunks


def run_chunks(
    case: Case, chunks: list[Any], schedule: Any, step: Any, *, forward_only: bool = False
) -> Any:
    """One forward and backward pass over the rank's micro-batches; what the schedule returns."""
    data = items(case, mpu.get_data_parallel_rank())
    iterators: Any = [iter(data) for _ in chunks]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    return schedule(
        forward_step_func=step,
        data_iterator=iterators if case.vpp > 1 else iterators[0],
        model=chunks if case.vpp > 1 else chunks[0],
        num_microbatches=case.num_micro,
        seq_length=case.length,
        micro_batch_size=1 if case.packed else case.rows,
        forward_only=forward_only,
    )


def plans_of(case: Case) -> tuple[Regate, StepPlan, DifficultyStore]:
    """The same step planned in one process; fills up to what the case's layout needs."""
    store = reference_of(case)
    difficulty = DifficultyStore(store.index)
    zigzag = 2 * case.cp if case.cp > 1 else 1
    by_sample = case.layout == "thd" and case.cp > 1
    multiple = zigzag * (case.tp if case.sp and not by_sample else 1)
    config = replace(case.config, token_multiple=math.lcm(case.token_multiple, multiple))
    session = Regate(config, reference=store, difficulty=difficulty)
    session.one_row = case.layout == "thd" and not by_sample
    window = [item.tokens for rank in all_items(case) for item in rank]
    return session, session.plan_step(window), difficulty


def check(case: Case) -> Report:
    """Raises AssertionError with what differs."""
    regate, chunks = run_step(case)
    session, plan, difficulty = plans_of(case)
    model = plain_model(case)
    flat = [item for rank in all_items(case) for item in rank]
    losses, balance = [], torch.zeros((), dtype=torch.double)
    for item, micro in zip(flat, plan.micro, strict=True):
        losses.append(batch_losses(model, item, micro))
        balance = balance + balance_loss(model)
    ((torch.cat(losses).sum() + balance) / plan.num_targets_global).backward()
    report = Report()
    report.gradient = check_gradients(chunks, model.weights)
    report.loss = check_losses(case, regate, losses)
    regate.step(applied=True)
    for micro, losses_L in zip(plan.micro, losses, strict=True):
        session.record(micro, losses_L.float())
    session.finish_step(applied=True)
    check_difficulty(case, regate, difficulty)
    dismantle(chunks)
    return report


def dismantle(chunks: list[Any]) -> None:
    """Let go of groups: hooks of DDP on autograd's nodes keep models with experts for ever."""
    for module in [m for chunk in chunks for m in chunk.modules()]:
        vars(module).clear()


def plain_model(case: Case) -> PlainModel:
    if case.model != "llava":
        return PlainModel(case, {})
    vision = PlainVision(host_config(case))
    fill(vision)
    weights = dict(vision.double().named_parameters())
    return PlainModel(case, weights, vision)


def check_gradients(chunks: list[Any], expected: dict[str, Tensor]) -> float:
    whole = math.sqrt(
        sum(float(w.grad.norm()) ** 2 for w in expected.values() if w.grad is not None)
    )
    worst, bad = 0.0, []
    for chunk in chunks:
        for name, parameter in named(chunk.module).items():
            wanted = expected[name].grad if name in expected else None
            wanted = (
                torch.zeros(parameter.shape) if wanted is None else shard(wanted, parameter, name)
            )
            error = float((parameter.main_grad.double() - wanted).norm())
            size = float(wanted.norm())
            worst = max(worst, error / (size + 1e-2 * whole))
            # Tower and projector lie below the whole decoder: rounding in single precision reaches
            # 1.2e-5 there in a dense step, too.
            tolerance = 2 * TOLERANCE if name.startswith("vision") else TOLERANCE
            if not error <= tolerance * size + 1e-7 * whole:
                bad.append(f"{name}: {error:.2e} of {size:.2e}")
    assert not bad, f"{len(bad)} gradients differ: " + "; ".join(bad[:6])
    return worst


def check_losses(case: Case, regate: MegatronRegate, expected: list[Tensor]) -> float:
    assert regate.run is not None
    worst = 0.0
    first = mpu.get_data_parallel_rank() * case.num_micro
    for number, losses_L in regate.run.losses.items():
        local = regate.run.micro[number]
        mine = local.context_L == mpu.get_context_parallel_rank()
        wanted = expected[first + number].detach()[mine]
        error = (losses_L.double() - wanted).abs()
        assert bool((error <= TOLERANCE * (1.0 + wanted)).all()), f"loss off by {error.max():.2e}"
        worst = max([worst, *error.tolist()])
    return worst


def check_difficulty(case: Case, regate: MegatronRegate, expected: DifficultyStore) -> None:
    planner = regate._attached.planner
    if planner is None or planner.difficulty is None:
        return
    mine = items(case, mpu.get_data_parallel_rank())
    keys = [key for item in mine for key in item.tokens.flat_keys]
    found = planner.difficulty.read(keys)
    assert torch.allclose(found, expected.read(keys), rtol=1e-5, atol=1e-6)
