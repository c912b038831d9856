"""One optimizer step in each kind of loop on two ranks, as a user would write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from regate_ds import Loop, attach
from tests.adapters.deepspeed.zero_cases_helper import (
    IMAGES_ELIDED,
    MLP_ONLY,
    SEES,
    ZeroCase,
)
from tests.adapters.deepspeed.zero_checks_helper import NUM_STEPS, loss_of, reference_of
from tests.support.measure import Gradients

UNREACHED = ("post_layernorm",)
"""Weights of LLaVA's tower that no image reaches, in the host's own run neither."""


def model_of(case: ZeroCase) -> nn.Module:
    """The case's model without the weights that nothing reaches, which DDP would wait for."""
    model = case.model()
    for name, weight in model.named_parameters():
        if any(part in name for part in UNREACHED):
            weight.requires_grad_(False)
    return model


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


@dataclass(frozen=True)
class Found:
    """What the optimizer is given, and the losses of this rank's micro-batches."""

    gradients: Gradients
    losses: list[Tensor]


def found_in(model: nn.Module, losses: list[Tensor]) -> Found:
    named = model.named_parameters()
    return Found({name: whole(p.grad) for name, p in named if p.grad is not None}, losses)


def attached(case: ZeroCase) -> tuple[nn.Module, Any]:
    model = model_of(case)
    options = {"reference": reference_of(case), "own_loss": case.own_loss}
    return model, attach(model, case.config, total_steps=NUM_STEPS, **options)


def run_ddp(rank: int, case: ZeroCase) -> Found:
    model, regate = attached(case)
    wrapped = DistributedDataParallel(model)
    loop, losses = Loop(accumulation=case.accumulation, group=dist.group.WORLD), []
    for window in regate.windows(case.batches(rank), loop):
        for number, batch in enumerate(window, start=1):
            with nullcontext() if number == len(window) else wrapped.no_sync():
                output = wrapped(**batch)
                losses.append(output.losses.detach().clone())
                loss_of(regate, output, case).backward()
        regate.step(applied=True)
    return found_in(model, losses)


def shard(model: nn.Module, factor: float | None = None) -> None:
    """Each layer by itself, the tower's too, and the rest with the root."""
    parts = [part for part in model.modules() if type(part).__name__.endswith(_LAYERS)]
    for part in [*parts, model.get_output_embeddings(), model]:
        fully_shard(part)
        if factor is not None:
            part.set_gradient_divide_factor(factor)
            part.set_force_sum_reduction_for_comms(True)


_LAYERS = ("DecoderLayer", "EncoderLayer", "VLVisionBlock")


def run_fsdp2(rank: int, case: ZeroCase, factor: float | None = None) -> Found:
    model, regate = attached(case)
    shard(model, factor)
    loop, losses = Loop(accumulation=case.accumulation, group=dist.group.WORLD), []
    for window in regate.windows(case.batches(rank), loop):
        for number, batch in enumerate(window, start=1):
            model.set_requires_gradient_sync(number == len(window))
            output = model(**batch)
            losses.append(output.losses.detach().clone())
            loss_of(regate, output, case).backward()
        regate.step(applied=True)
    found = found_in(model, losses)
    if factor is not None:
        # The loop's own business: with another factor than the ranks' number it is a sum.
        assert regate._host.divides_ranks_by == factor
    return found


def run_accelerate(rank: int, case: ZeroCase) -> Found:
    accelerator = Accelerator(gradient_accumulation_steps=case.accumulation, cpu=True)
    model, regate = attached(case)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert isinstance(wrapped, DistributedDataParallel)
    losses: list[Tensor] = []
    for window in regate.windows(case.batches(rank), accelerator):
        for batch in window:
            with accelerator.accumulate(wrapped):
                output = wrapped(**batch)
                losses.append(output.losses.detach().clone())
                accelerator.backward(loss_of(regate, output, case))
                optimizer.step()
        regate.step(applied=not optimizer.step_was_skipped)
    return found_in(model, losses)


LOOPS: dict[str, Callable[[int, ZeroCase], Found]] = {
    "DDP": run_ddp,
    "FSDP2": run_fsdp2,
    "accelerate": run_accelerate,
}


def cases() -> Iterator[tuple[str, str, ZeroCase]]:
    """(loop, what is special, case)"""
    uneven, elided = ZeroCase(), ZeroCase(accumulation=4, knobs=IMAGES_ELIDED)
    silent = ZeroCase(rows=(((24,), (17,)), ((2,),)), targets_of_last_rank=0)
    for loop in LOOPS:
        yield loop, "uneven", uneven
        yield loop, "images elided, recompute", replace(elided, recompute=True)
        yield loop, "no target on a rank", silent
    for loop in ("DDP", "FSDP2"):
        yield loop, "own loss", replace(uneven, own_loss=True, accumulation=4)
        yield loop, "a dense step", replace(uneven, knobs=(("warmup", 1),))
        yield loop, "MLP only, recompute", replace(elided, recompute=True, knobs=MLP_ONLY)
    rows = (((24,), (17,)), ((19,), (12,)))
    yield "FSDP2", "images and videos", ZeroCase("qwen2_vl", 3, len(SEES), rows, sees=SEES)
    yield "DDP", "images and videos", ZeroCase("qwen2_vl", 1, len(SEES), rows, sees=SEES)


CASES = {f"{loop}, accumulation {c.accumulation}: {what}": (loop, c) for loop, what, c in cases()}
