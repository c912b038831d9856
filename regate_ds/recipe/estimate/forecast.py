"""Forecast a run: time of its steps, memory of its ranks, and what limits it.

    seconds of a step    FLOPs of the busiest rank / (peak of the GPU x efficiency), times the
                         pipeline's bubble, and what is sent, which is taken not to overlap
    memory of a rank     weights, gradients and optimizer (`needs.py`), and activations
    run                  dense and sparse steps by the schedule, the teacher's pass and the ranking

The FLOPs are counted, not guessed; the efficiency is one number for all of them, and cancels in
ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regate_ds.algorithm.executions.execution import Span
from regate_ds.cost.shape import ModelShape
from regate_ds.job.process import Process
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus
from regate_ds.recipe.estimate.activations import activations_of
from regate_ds.recipe.estimate.gpus import NETWORK, PER_NODE, Gpu
from regate_ds.recipe.estimate.needs import estimate
from regate_ds.recipe.estimate.plan_walk import data_ranks_of
from regate_ds.recipe.estimate.ran import run_host, run_shape
from regate_ds.recipe.estimate.sizes import sample_sizes
from regate_ds.recipe.estimate.steps import StepCost, counted_steps, flops_before, step_cost
from regate_ds.recipe.order import Order, make_order


@dataclass(frozen=True)
class Machine:
    """The ranks of a run."""

    gpu: Gpu
    num: int
    efficiency: float
    """Share of the GPU's peak that products reach."""


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

    seconds: dict[str, float]
    """Of a dense and of a sparse step."""

    flops: dict[str, float]
    """Of these, over all ranks."""

    memory: dict[str, float]
    """Bytes of a rank, dense and sparse, each with and without checkpointing."""

    steps: dict[str, int]
    run_seconds: float
    dense_run_seconds: float
    """The same run with every step dense, without a teacher and a ranking."""

    before_seconds: float
    """The teacher's pass and the ranking of images."""

    limits: dict[str, float]
    """Seconds of a sparse step by what they are for."""


def forecast(
    config: RunConfig,
    corpus: Corpus,
    machine: Machine,
    *,
    with_memory: bool = True,
    steps: Mapping[str, Sequence[int]] | None = None,
) -> Forecast:
    """Forecast the run on this machine; the corpus's student is left as it is.

    with_memory: False leaves the memory out, which takes longest to tell.
    steps: the steps whose mean a "dense" and a "sparse" step are; None takes an epoch's for both.
    """
    host = run_host(config)
    shape = run_shape(host)
    sizes = sample_sizes(corpus)
    order = _order(config, corpus, machine.num)
    elision = config.elision
    last = elision.last_layer or shape.depth
    spans = elision.execution.spans(elision.first_layer, last) if elision.chooses else ()
    shares = elision.shares_at(0.5) if elision.chooses else None
    if shares is not None and not elision.execution.chooses:
        shares = None
    of = steps or dict.fromkeys(("dense", "sparse"), counted_steps(order))
    costs = {
        "dense": step_cost(config, shape, sizes, order, None, (), of["dense"]),
        "sparse": step_cost(config, shape, sizes, order, shares, spans, of["sparse"]),
    }
    sent = _sent_seconds(config, host, shape, costs, machine)
    bubble = _bubble(config)
    rate = machine.gpu.bf16 if config.run.precision == "bf16" else machine.gpu.fp32
    rate *= machine.efficiency * _ranks_of_a_copy(config)
    seconds = {
        kind: cost.flops * cost.busiest * bubble / rate + sent[kind] for kind, cost in costs.items()
    }
    num_dense, num_sparse = _num_steps(config, order.total_steps)
    before = flops_before(config, shape, sizes) / (rate / _ranks_of_a_copy(config) * machine.num)
    run = num_dense * seconds["dense"] + num_sparse * seconds["sparse"]
    return Forecast(
        seconds=seconds,
        flops={kind: cost.flops * order.world_size for kind, cost in costs.items()},
        memory=_memory(config, host, costs, spans, machine.num) if with_memory else {},
        steps={"dense": num_dense, "sparse": num_sparse},
        run_seconds=run + before,
        dense_run_seconds=order.total_steps * seconds["dense"],
        before_seconds=before,
        limits=_limits(costs["sparse"], bubble, rate, sent["sparse"]),
    )


def _order(config: RunConfig, corpus: Corpus, num_ranks: int) -> Order:
    num_data = data_ranks_of(config.parallel, num_ranks)
    if num_data < 1:
        raise ValueError(
            f"--gpus {num_ranks}: one copy of the model takes {_ranks_of_a_copy(config)} by "
            "parallel.*; give as many, or a multiple"
        )
    return make_order(config, corpus, Process(0, num_data, torch.device("cpu")))


def _ranks_of_a_copy(config: RunConfig) -> int:
    return 1 if config.parallel is None else config.parallel.ranks_per_copy


def _bubble(config: RunConfig) -> float:
    """Return the time of a pipeline over that of its busy part."""
    if config.parallel is None:
        return 1.0
    stages, parts = config.parallel.pipeline, config.parallel.virtual
    return 1.0 + (stages - 1) / (parts * config.run.accumulation)


def _num_steps(config: RunConfig, total: int) -> tuple[int, int]:
    schedules = config.elision.schedules(total)
    num_dense = sum(schedules.is_dense(step) for step in range(total))
    return num_dense, total - num_dense


def _sent_seconds(
    config: RunConfig, host: Any, shape: ModelShape, costs: dict[str, StepCost], machine: Machine
) -> dict[str, float]:
    """Return the seconds of gradients over data ranks and of activations over tensor ranks."""
    size = 2 if config.run.precision == "bf16" else 4
    num_data, parallel = data_ranks_of(config.parallel, machine.num), config.parallel
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    parts = 1 if parallel is None else parallel.weight_parts
    bandwidth = machine.gpu.link if machine.num <= PER_NODE else NETWORK
    gradients = 2 * trained * size / parts * (num_data - 1) / num_data / bandwidth
    found = {}
    for kind, cost in costs.items():
        found[kind] = gradients
        if parallel is not None and parallel.tensor > 1:
            rows = cost.largest.kept * config.run.accumulation
            # Two sums in each layer, forward and backward, each to and fro.
            moved = 8 * rows * shape.hidden * size * shape.depth / parallel.pipeline
            found[kind] += moved * (parallel.tensor - 1) / parallel.tensor / machine.gpu.link
    return found


def _memory(
    config: RunConfig,
    host: Any,
    costs: dict[str, StepCost],
    spans: Sequence[Span],
    num_ranks: int,
) -> dict[str, float]:
    fixed = estimate(config, num_ranks).memory
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    share = 1.0
    if config.parallel is not None:
        # A stage holds its layers for as many micro-batches as there are stages.
        flight = min(config.parallel.pipeline, config.run.accumulation) / config.parallel.pipeline
        cut = config.parallel.context * (config.parallel.tensor if config.parallel.sequence else 1)
        share = flight / cut
    found = {}
    for kind, cost in costs.items():
        for name, recompute in (("", False), (", checkpointed", True)):
            of = spans if kind == "sparse" else ()
            own = activations_of(host, cost.largest, of, dtype, recompute=recompute)
            found[kind + name] = fixed + share * own.layers + own.head
    return found


def _limits(cost: StepCost, bubble: float, rate: float, sent: float) -> dict[str, float]:
    found = {name: flops / rate for name, flops in cost.parts.items()}
    busy = sum(found.values())
    found["imbalance of ranks"] = busy * (cost.busiest - 1)
    found["bubble of the pipeline"] = busy * cost.busiest * (bubble - 1)
    found["communication"] = sent
    return found
