"""One step of a Megatron-core GPTModel on the device against the plain model in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.gpu.check_helper import Check, Measured, Skipped
from tests.gpu.place_helper import join_alone, why_missing


def oracle(device: torch.device) -> Iterator[Check | Skipped]:
    if device.type == "cpu":
        from regate_ds.adapters.megatron_on_cpu.shim import install

        install()
    yield Check("a step, padded rows: gradients", "fp32", partial(step, device, "padded"))
    title = "a step, ragged rows, plain attention: gradients"
    yield Check(title, "fp32", partial(step, device, "ragged"))
    missing = why_missing("transformer_engine")
    why = missing or "no check is written for its layers, whose weights have other names"
    yield Skipped("ragged rows with Transformer Engine", why)


megatron = oracle
"""The part of its own has the same checks."""


def step(device: torch.device, row_format: str) -> Measured:
    """Largest error of a gradient; the bounds of each are those of the tests on CPUs.

    An error beyond them is raised, with the names of the tensors.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from regate_ds.adapters.megatron import attach
    from tests.adapters.megatron import checks_helper as on_cpu
    from tests.adapters.megatron.build_helper import join
    from tests.adapters.megatron.cases_helper import TOTAL_STEPS, Case

    case = Case(row_format=row_format)
    join_alone(device)
    join(case)
    try:
        chunk = build_on(device, case)
        reference = on_cpu.reference_of(case)
        regate = attach(
            [chunk],
            case.config,
            total_steps=TOTAL_STEPS,
            reference=reference,
            row_format=row_format,
        )
        schedule = regate.wrap(get_forward_backward_func())
        on_cpu.run_chunks(case, [chunk], schedule, partial(forward_on, device))
        _, plan, _ = on_cpu.plans_of(case)
        model, _ = on_cpu.plain_step(case, plan)
        for parameter in chunk.parameters():
            parameter.main_grad = parameter.main_grad.cpu()
        own = partial(on_cpu.own_errors, model, plan)
        error = on_cpu.check_gradients([chunk], model.weights, own)
        regate.step(applied=True)
    finally:
        mpu.destroy_model_parallel()
    return Measured(error, on_cpu.MOST)


def build_on(device: torch.device, case: Any) -> nn.Module:
    """Filled on the CPU with the weights that the plain model has."""
    from tests.adapters.megatron.build_helper import fill, gpt, host_config, wrapped

    config = host_config(case)
    chunk = gpt(case, config, None)
    chunk.model_type = None
    fill(chunk)
    return wrapped(case, config, chunk.to(device))


def forward_on(device: torch.device, iterator: Any, model: Any) -> Any:
    """A user's forward step."""
    ids = next(iterator).ids_BT.to(device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    # The stand-in for Transformer Engine's attention makes masks of its own.
    with torch.device(device):
        return model(ids, positions, None, labels=ids), None
