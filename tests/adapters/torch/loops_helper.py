"""One optimizer step in each kind of loop on two ranks, as a user would write it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from regate_ds import Loop, attach
from tests.adapters.deepspeed.zero_cases_helper import (
    IMAGES_ELIDED,
    MERGED,
    MLP_ONLY,
    SEES,
    ZeroCase,
)
from tests.adapters.deepspeed.zero_checks_helper import (
    NUM_STEPS,
    loss_of,
    reference_of,
    zero_settings,
)
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


def found_in(model: nn.Module, losses: list[Tensor], gradient_of: Any = None) -> Found:
    of = gradient_of or (lambda weight: weight.grad)
    named = {name: of(p) for name, p in model.named_parameters() if p.requires_grad}
    return Found({name: whole(g) for name, g in named.items() if g is not None}, losses)


def attached(case: ZeroCase, model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    model = model or model_of(case)
    options = {"reference": reference_of(case), "own_loss": case.own_loss}
    return model, attach(model, case.config, total_steps=NUM_STEPS, **options)


def run_ddp(rank: int, case: ZeroCase, *, finds_unused: bool = False) -> Found:
    model, regate = attached(case, case.model() if finds_unused else None)
    wrapped = DistributedDataParallel(model, find_unused_parameters=finds_unused)
    loop, losses = Loop(accumulation=case.accumulation, group=dist.group.WORLD), []
    for window in regate.windows(case.batches(rank), loop):
        for number, batch in enumerate(window, start=1):
            with nullcontext() if number == len(window) else wrapped.no_sync():
                output = wrapped(**batch)
                losses.append(output.losses.detach().clone())
                loss_of(regate, output, case).backward()
        regate.step(applied=True)
    return found_in(model, losses)


def shard(model: nn.Module, factor: float | None = None, **options: Any) -> None:
    """Each layer by itself, the tower's too, and the rest with the root."""
    parts = [part for part in model.modules() if type(part).__name__.endswith(_LAYERS)]
    for part in [*parts, model.get_output_embeddings(), model]:
        fully_shard(part, **options)
        if factor is not None:
            part.set_gradient_divide_factor(factor)
            part.set_force_sum_reduction_for_comms(True)


_LAYERS = ("DecoderLayer", "EncoderLayer", "VLVisionBlock")


def run_fsdp2(rank: int, case: ZeroCase, factor: float | None = None, **options: Any) -> Found:
    model, regate = attached(case)
    shard(model, factor, **options)
    loop, losses = Loop(accumulation=case.accumulation, group=dist.group.WORLD), []
    for window in regate.windows(case.batches(rank), loop):
        for number, batch in enumerate(window, start=1):
            model.set_requires_gradient_sync(number == len(window))
            output = model(**batch)
            losses.append(output.losses.detach().clone())
            loss_of(regate, output, case).backward()
        regate.step(applied=True)
    return found_in(model, losses)


def run_accelerate(rank: int, case: ZeroCase, **options: Any) -> Found:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(gradient_accumulation_steps=case.accumulation, cpu=True, **options)
    return accelerated(rank, case, accelerator, "DistributedDataParallel")


def run_accelerate_fsdp2(rank: int, case: ZeroCase) -> Found:
    """accelerate 1.15 gives FSDP to GPUs only; what it does then can be done on the CPU."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer", "CLIPEncoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(gradient_accumulation_steps=case.accumulation, cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    try:
        return accelerated(rank, case, accelerator, "FSDP")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def run_accelerate_deepspeed(rank: int, case: ZeroCase) -> Found:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(hf_ds_config=zero_settings(stage=2, accumulation=case.accumulation))
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ, ACCELERATE_USE_DEEPSPEED="true"):
        accelerator = Accelerator(
            gradient_accumulation_steps=case.accumulation, deepspeed_plugin=plugin
        )
        return accelerated(rank, case, accelerator, "DeepSpeedEngine")


def accelerated(rank: int, case: ZeroCase, accelerator: Accelerator, kind: str) -> Found:
    """kind: how the type's name begins that accelerate makes of the model."""
    model, regate = attached(case)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert type(wrapped).__name__.startswith(kind)
    losses: list[Tensor] = []
    kept: list[Found] = []
    if kind == "DeepSpeedEngine":
        # The engine's step, which backward calls, lets go of the gradients.
        step = wrapped.step
        wrapped.step = lambda: (kept.append(found_in(model, losses, safe_get_full_grad)), step())
    for window in regate.windows(case.batches(rank), accelerator):
        for batch in window:
            with accelerator.accumulate(wrapped):
                output = wrapped(**batch)
                losses.append(output.losses.detach().clone())
                accelerator.backward(loss_of(regate, output, case))
                optimizer.step()
        regate.step(applied=not optimizer.step_was_skipped)
    return kept[0] if kept else found_in(model, losses)


_BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
BY_BFLOAT16: dict[str, Callable[[int, ZeroCase], Found]] = {
    "FSDP2 in bf16": partial(run_fsdp2, mp_policy=_BFLOAT16),
    "accelerate in bf16": partial(run_accelerate, mixed_precision="bf16"),
}

LOOPS: dict[str, Callable[[int, ZeroCase], Found]] = {
    "DDP": run_ddp,
    "DDP that finds unused weights": partial(run_ddp, finds_unused=True),
    "FSDP2": run_fsdp2,
    "FSDP2 with a divide factor": partial(run_fsdp2, factor=1.0),
    "accelerate": run_accelerate,
    "accelerate with FSDP2": run_accelerate_fsdp2,
    **BY_BFLOAT16,
    # Last: its ranks are no longer those that accelerate itself knows.
    "accelerate with DeepSpeed": run_accelerate_deepspeed,
}


def cases() -> Iterator[tuple[str, str, ZeroCase]]:
    """(loop, what is special, case)"""
    uneven, elided = ZeroCase(), ZeroCase(accumulation=4, knobs=IMAGES_ELIDED)
    silent = ZeroCase(rows=(((24,), (17,)), ((2,),)), targets_of_last_rank=0)
    rows = (((24,), (17,)), ((19,), (12,)))
    mixed = ZeroCase("qwen2_vl", accumulation=len(SEES), rows=rows, sees=SEES)
    for loop in ("DDP", "FSDP2", "accelerate"):
        yield loop, "uneven", uneven
        yield loop, "images elided, recompute", replace(elided, recompute=True)
    for loop in ("DDP", "FSDP2"):
        yield loop, "no target on a rank", silent
        yield loop, "images and videos", mixed
    yield "DDP", "own loss", replace(uneven, own_loss=True, accumulation=4)
    yield "DDP", "a dense step", replace(uneven, knobs=(("warmup", 1),))
    for loop in ("DDP", "FSDP2"):
        yield loop, "merged", replace(uneven, accumulation=4, knobs=MERGED)
    yield "FSDP2", "MLP only, recompute", replace(uneven, recompute=True, knobs=MLP_ONLY)
    yield "FSDP2 with a divide factor", "uneven", replace(uneven, accumulation=4)
    for loop in ("DDP that finds unused weights", *BY_BFLOAT16):
        yield loop, "uneven", uneven
    yield "accelerate with FSDP2", "uneven", replace(uneven, accumulation=4)
    yield "accelerate with DeepSpeed", "uneven", replace(uneven, accumulation=4)


CASES = {f"{loop}, accumulation {c.accumulation}: {what}": (loop, c) for loop, what, c in cases()}
