"""One optimizer step of a case against the plain reference: losses, gradients, difficulty."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from regate_ds.adapters.megatron import MegatronRegate, attach
from regate_ds.algorithm.plan import StepPlan
from regate_ds.algorithm.rows import RowLayout
from regate_ds.config import RegateConfig
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.adapters.megatron.build_helper import build, fill, host_config, join, named, shard
from tests.adapters.megatron.cases_helper import (
    BRIDGED,
    TOTAL_STEPS,
    Case,
    Item,
    items,
    positions_of,
)
from tests.adapters.megatron.llava_helper import ImageItem, PlainVision
from tests.adapters.megatron.plain_gpt_helper import (
    PlainModel,
    balance_loss,
    batch_losses,
    merged_losses,
)
from tests.support.stores import RandomReference, index_of

TOLERANCE, MOST = 1e-5, 5e-5
"""Relative error of a gradient; where it is larger, twice the plain model's own in single precision
is allowed (deep models, and what lies below a decoder), up to MOST."""


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
        if case.packed:
            packed, places = packing(item.tokens.segment_BT[0].tolist(), case)
            parts = [cut(item.ids_BT[:, a:b], case.cp) for a, b in pairwise(places)]
            ids = torch.cat(parts, dim=1)
        else:
            ids = cut(item.ids_BT, case.cp)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        if case.positions == "mrope":
            positions = positions_of(case, item)
        if case.model in BRIDGED:
            return model(**item.inputs, labels=item.inputs["input_ids"]), None
        if isinstance(item, ImageItem):
            output, _ = model(item.images, ids, positions, None)
            return output, None
        output = model(ids, positions, None, labels=ids, packed_seq_params=packed)
        return output, None

    return step


def packing(segment_T: list[int], case: Case) -> tuple[PackedSeqParams, list[int]]:
    """A packed row as Megatron tells of it: tokens of each sample, and where it is filled up to."""
    multiple = 2 * case.cp if case.cp > 1 else 1
    counts = [segment_T.count(sample) for sample in range(max(segment_T) + 1)]
    filled = [-(-count // multiple) * multiple for count in counts]
    if rest := len(segment_T) - sum(filled):
        counts, filled = [*counts, rest], [*filled, rest]
    places, longest = [*accumulate(filled, initial=0)], max(filled)
    at = torch.tensor(places, dtype=torch.int32)
    own = torch.tensor([*accumulate(counts, initial=0)], dtype=torch.int32) if case.cp > 1 else at
    padded = at if case.cp > 1 else None
    return PackedSeqParams("thd", own, own, padded, padded, longest, longest), places


def cut(x_BT: Tensor, context_size: int) -> Tensor:
    """This context rank's zigzag part of rows."""
    if context_size == 1:
        return x_BT
    chunks, rank = x_BT.chunk(2 * context_size, dim=1), mpu.get_context_parallel_rank()
    return torch.cat([chunks[rank], chunks[2 * context_size - 1 - rank]], dim=1)


def attached(case: Case, chunks: list[Any], config: RegateConfig | None = None) -> MegatronRegate:
    """A teacher is given only where the method asks for one."""
    config = config or case.config
    reference = reference_of(case) if config.needs_reference else None
    return attach(
        chunks,
        config,
        total_steps=TOTAL_STEPS,
        reference=reference,
        row_format=case.row_format,
    )


def run_step(case: Case) -> tuple[MegatronRegate, list[Any]]:
    """Groups, model, and one step of forward and backward passes."""
    join(case)
    chunks = build(case)
    regate = attached(case, chunks)
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
    """The first step planned in one process; fills up to what the case's layout needs."""
    session, difficulty = session_of(case)
    window = [item.tokens for rank in all_items(case) for item in rank]
    return session, session.plan_step(window), difficulty


def session_of(case: Case) -> tuple[Regate, DifficultyStore]:
    """A session of one process, and its difficulty."""
    store = reference_of(case)
    columns = {one.name: one.unseen for one in case.config.statistics}
    difficulty = DifficultyStore(store.index, columns=columns)
    stores = Stores(store, difficulty)
    session = Regate(case.config, stores, total_steps=TOTAL_STEPS, rows=rows_of(case))
    return session, difficulty


def rows_of(case: Case) -> RowLayout:
    """What the case's ranks can divide, worked out anew."""
    zigzag = 2 * case.cp if case.cp > 1 else 1
    multiple = math.lcm(case.token_multiple, zigzag * (case.tp if case.sp else 1))
    if case.row_format == "ragged":
        return RowLayout(row_format="ragged", multiple=multiple, sample_multiple=zigzag)
    return RowLayout(multiple=multiple, equal=True)


def check(case: Case) -> Report:
    """Raises AssertionError with what differs."""
    join(case)
    chunks = build(case)
    regate = attached(case, chunks)
    planned = session_of(case)
    reports = [check_step(case, regate, chunks, planned) for _ in range(2 if case.merged else 1)]
    dismantle(chunks)
    return Report(*(max(each) for each in zip(*(vars(one).values() for one in reports))))


def check_step(
    case: Case, regate: MegatronRegate, chunks: list[Any], planned: tuple[Regate, DifficultyStore]
) -> Report:
    """The step that comes next."""
    run_chunks(case, chunks, regate.wrap(get_forward_backward_func()), forward_step(case))
    session, difficulty = planned
    plan = session.plan_step([item.tokens for rank in all_items(case) for item in rank])
    assert plan.is_merged == (bool(case.merged) and plan.step == 0)
    model, losses = plain_step(case, plan)
    check_counts(case, regate, plan)
    report = Report()
    rounding = lru_cache(maxsize=1)(lambda: own_errors(model, plan))
    if case.model == "llava" and case.tp > 1:
        # Its tower works on all tensor ranks together.
        rounding()
    report.gradient = check_gradients(chunks, model.weights, rounding)
    report.loss = check_losses(case, regate, losses)
    regate.step(applied=True)
    entropies = torch.stack(model.entropies).split([len(losses_L) for losses_L in losses])
    for micro, losses_L, entropy_L in zip(plan.micro, losses, entropies, strict=True):
        session.record(micro, losses_L.float(), entropy=entropy_L.float())
    session.finish_step(applied=True)
    check_difficulty(case, regate, difficulty)
    return report


def dismantle(chunks: list[Any]) -> None:
    """Let go of groups: hooks of DDP on autograd's nodes keep models with experts for ever."""
    for module in [m for chunk in chunks for m in chunk.modules()]:
        vars(module).clear()


def plain_step(
    case: Case, plan: StepPlan, dtype: torch.dtype = torch.double
) -> tuple[PlainModel, list[Tensor]]:
    """The plain model with its gradients, and each micro-batch's losses."""
    model = plain_model(case, dtype)
    flat = [item for rank in all_items(case) for item in rank]
    losses, balance = [], torch.zeros((), dtype=dtype)
    for item, micro in zip(flat, plan.micro, strict=True):
        is_merged = micro.patches is not None
        losses.append(merged_losses(model, item) if is_merged else batch_losses(model, item, micro))
        balance = balance + balance_loss(model)
    weights = [one.weight_L for one in plan.micro]
    total = sum(
        (losses_L if weight_L is None else losses_L * weight_L).sum()
        for losses_L, weight_L in zip(losses, weights, strict=True)
    )
    ((total + balance) / plan.num_targets_global).backward()
    return model, losses


def plain_model(case: Case, dtype: torch.dtype = torch.double) -> PlainModel:
    if case.model != "llava":
        return PlainModel(case, {}, dtype=dtype)
    vision = PlainVision(host_config(case))
    fill(vision)
    weights = dict(vision.to(dtype).named_parameters())
    return PlainModel(case, weights, vision, dtype)


def own_errors(model: PlainModel, plan: StepPlan) -> dict[str, float]:
    """What single precision alone makes of the plain model's gradients, relative to each."""
    single, _ = plain_step(model.case, plan, torch.float)
    return {
        name: float((single.weights[name].grad.double() - weight.grad).norm() / weight.grad.norm())
        for name, weight in model.weights.items()
        if weight.grad is not None and bool(weight.grad.any())
    }


def check_gradients(
    chunks: list[Any], expected: dict[str, Tensor], own: Callable[[], dict[str, float]]
) -> float:
    """own: errors that are rounding, asked for where a gradient is off by more than TOLERANCE."""
    whole = math.sqrt(
        sum(float(w.grad.norm()) ** 2 for w in expected.values() if w.grad is not None)
    )
    worst, off = 0.0, {}
    for chunk in chunks:
        for name, parameter in named(chunk.module).items():
            wanted = expected[name].grad if name in expected else None
            if wanted is None:
                wanted = torch.zeros(parameter.shape)
            elif wanted.shape != parameter.shape:
                # A plain tower that is Megatron's own has this rank's part already.
                wanted = shard(wanted, parameter, name)
            error = float((parameter.main_grad.double() - wanted).norm())
            size = float(wanted.norm())
            worst = max(worst, error / (size + 1e-2 * whole))
            if not error <= TOLERANCE * size + 1e-7 * whole:
                off[name] = (error, size)
    rounding = own() if off else {}
    bad = [
        f"{name}: {error:.2e} of {size:.2e} (alone {rounding.get(name, 0.0):.2e})"
        for name, (error, size) in off.items()
        if not error <= min(2 * rounding.get(name, 0.0), MOST) * size + 1e-7 * whole
    ]
    assert not bad, f"{len(bad)} gradients differ: " + "; ".join(bad[:6])
    return worst


def check_counts(case: Case, regate: MegatronRegate, expected: StepPlan) -> None:
    """Every rank knows the step's counts. Data ranks pad their own rows, each to its longest."""
    found = regate.metrics()
    elides = case.image_share < 1.0 and not case.dense and not expected.is_merged
    assert (found["image_kept"] < found["image_total"]) == elides
    names = [name for name in expected.counts if name != "padded" or case.dp == 1]
    assert {name: found[name] for name in names} == {n: expected.counts[n] for n in names}
    assert regate.plan is not None
    assert regate.plan.num_targets_global == expected.num_targets_global


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
    if planner is None:
        return
    store = planner.opened.difficulty
    if store is None:
        assert not case.config.statistics
        return
    mine = items(case, mpu.get_data_parallel_rank())
    keys = [key for item in mine for key in item.tokens.flat_keys]
    found, wanted = store.read(keys), expected.read(keys)
    assert found.keys() == wanted.keys()
    for name, values_N in wanted.items():
        assert torch.allclose(found[name], values_N, rtol=1e-5, atol=1e-6), name
