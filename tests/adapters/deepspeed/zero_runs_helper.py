"""Runs of several steps on two ranks: without elision, and what they remember with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from regate_ds.adapters.session_state import STATE_FOLDER
from regate_ds.adapters.torch.attach import attach
from regate_ds.algorithm.batch import IGNORE
from regate_ds.config import RegateConfig
from regate_ds.data.collate import Batch
from regate_ds.job.process import start_process
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.adapters.deepspeed.zero_cases_helper import RANKS, ZeroCase
from tests.adapters.deepspeed.zero_checks_helper import reference_of, run_named, start_engine
from tests.support.planning import config_of, gate_layers
from tests.support.stores import read_difficulty

NUM_STEPS = 5
ACCUMULATION = 2
LR = 0.02
DATA = ZeroCase("text", accumulation=2 * ACCUMULATION)
"""The micro-batches of two steps; runs go over them again."""

SKIPPED_STEP = 3


def loader(rank: int) -> list[Batch]:
    """The micro-batches of all steps."""
    made = DATA.batches(rank)
    return [made[i % len(made)] for i in range(NUM_STEPS * ACCUMULATION)]


def with_host_labels(batch: Batch) -> Batch:
    """What the host's own loss wants: the label of a position is its own token."""
    labels = batch.tokens.labels_BT.roll(1, dims=1)
    labels[:, 0] = IGNORE
    return Batch({**batch.inputs, "labels": labels}, batch.tokens)


def plain_losses(engine: Any, batches: list[Batch]) -> Iterator[Tensor]:
    """A training loop that has never heard of us."""
    for batch in batches:
        loss = engine(**batch.inputs).loss
        engine.backward(loss)
        engine.step()
        yield loss.detach()


def disabled_losses(regate: Any, engine: Any, batches: list[Batch]) -> Iterator[Tensor]:
    for window in regate.windows(batches, engine):
        for inputs in window:
            loss = regate.loss(engine(**inputs))
            engine.backward(loss)
            engine.step()
            yield loss.detach()
        regate.step(applied=engine.was_step_applied())


def check_disabled(rank: int, stage: int) -> None:
    batches = [with_host_labels(batch) for batch in loader(rank)]
    host, ours = DATA.model(), DATA.model()
    regate = attach(ours, RegateConfig(enabled=False), total_steps=NUM_STEPS)
    engine = start_engine(ours, stage, ACCUMULATION, LR)
    found = list(disabled_losses(regate, engine, batches))
    engine = start_engine(host, stage, ACCUMULATION, LR)
    wanted = list(plain_losses(engine, batches))
    assert len(found) == NUM_STEPS * ACCUMULATION
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    for (name, mine), theirs in zip(ours.named_parameters(), host.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([mine, theirs], enabled=stage == 3):
            assert torch.equal(mine, theirs), name


@dataclass(frozen=True)
class Remembered:
    """What a run leaves behind."""

    difficulty: list[Tensor]
    """After every step: all samples, in order of the answer index."""

    counts: list[dict[str, int]]


def knobs() -> RegateConfig:
    return config_of(warmup=1, final_dense_share=0.0)


def by_two_ranks(rank: int, folder: Path, stage: int) -> Remembered:
    reference, model = reference_of(DATA), DATA.model()
    regate = attach(model, knobs(), total_steps=NUM_STEPS, reference=reference)
    engine = start_engine(model, stage, ACCUMULATION, LR)
    difficulty, counts = [], []
    for number, window in enumerate(regate.windows(loader(rank), engine)):
        for inputs in window:
            engine.backward(regate.loss(engine(**inputs)))
            engine.step()
        regate.step(applied=number != SKIPPED_STEP)
        counts.append(regate.metrics())
        regate.save(folder / str(number))
        dist.barrier()
        # One process reads what two have written.
        store = DifficultyStore(reference.index)
        store.load(folder / str(number) / STATE_FOLDER)
        difficulty.append(read_difficulty(store, reference.index.keys))
    return Remembered(difficulty, counts)


def by_one_process() -> Remembered:
    reference, model = reference_of(DATA), DATA.model()
    store = DifficultyStore(reference.index)
    session = Regate(knobs(), Stores(reference, store), total_steps=NUM_STEPS)
    gate_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loaders = [loader(rank) for rank in RANKS]
    difficulty, counts = [], []
    for number in range(NUM_STEPS):
        own = slice(number * ACCUMULATION, (number + 1) * ACCUMULATION)
        window = [batch for each in loaders for batch in each[own]]
        step = session.plan_step([batch.tokens for batch in window])
        for batch, plan in zip(window, step.micro, strict=True):
            output = model(**batch.inputs, regate_plan=plan)
            (output.loss_sum / step.num_targets_global).backward()
            session.record(plan, output.losses)
        optimizer.step()
        optimizer.zero_grad()
        session.finish_step(applied=number != SKIPPED_STEP)
        difficulty.append(read_difficulty(store, reference.index.keys))
        counts.append({"step": number, "dense": step.is_dense, **step.counts})
    return Remembered(difficulty, counts)


def check_memory(rank: int, folder: Path, stage: int) -> None:
    found, wanted = by_two_ranks(rank, folder / str(stage), stage), by_one_process()
    assert found.counts == wanted.counts
    assert [row["dense"] for row in found.counts] == [True] + [False] * (NUM_STEPS - 1)
    for mine, theirs in zip(found.difficulty, wanted.difficulty, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=0.0)
    changed = [not torch.equal(a, b) for a, b in zip(found.difficulty, found.difficulty[1:])]
    assert changed == [step != SKIPPED_STEP for step in range(1, NUM_STEPS)]


RUNS: dict[str, Callable[[int, Path], None]] = {
    **{
        f"disabled, ZeRO-{stage}: losses and weights are a plain loop's, bit for bit": (
            lambda rank, folder, stage=stage: check_disabled(rank, stage)
        )
        for stage in (0, 2, 3)
    },
    **{
        f"enabled, ZeRO-{stage}: difficulty and counts are those of one process": (
            partial(check_memory, stage=stage)
        )
        for stage in (2, 3)
    },
}


def check_all_runs(rank: int, folder: str) -> None:
    start_process()
    checks = {name: partial(check, rank, Path(folder)) for name, check in RUNS.items()}
    run_named(rank, folder, checks)
