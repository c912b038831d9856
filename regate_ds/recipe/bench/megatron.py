"""The arms of `regate bench step` on Megatron-core: one model, to which each arm attaches in turn.

Planning is part of the step there. The baselines are the host's own step, with the output layer at
every position, and our dense one, with labels alone. Without a GPU the adapter's stand-ins for CUDA
are installed in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from regate_ds.cost.shape import shape_of
from regate_ds.data.collate import Batch
from regate_ds.recipe.bench.arms import HOST, StepArm
from regate_ds.recipe.bench.case import StepCase, as_loaded, make_data
from regate_ds.recipe.bench.host import ENDLESS, StepParts, plans_followed
from regate_ds.recipe.config.sections import ParallelConfig


class MegatronHost:
    """This rank's part of the decoder."""

    def __init__(self, case: StepCase, arms: dict[str, StepArm], device: torch.device) -> None:
        if device.type == "cpu":
            from regate_ds.adapters.megatron_on_cpu.shim import install

            install()
        from megatron.core import parallel_state as mpu
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        mpu.initialize_model_parallel(
            tensor_model_parallel_size=case.tensor,
            pipeline_model_parallel_size=case.pipeline,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(case.seed)
        self._case, self._arms = case, arms
        self._data = make_data(case)
        self._batches = [batch.to(device) for batch in self._data.batches]
        self._chunk = _chunk(case, device)
        self.layers: list[nn.Module] = list(self._chunk.module.decoder.layers)
        self.weights = list(self._chunk.parameters())
        with torch.device("meta"):
            self.shape = shape_of(LlamaForCausalLM(case.llama()))

    @contextmanager
    def ready(self, name: str) -> Iterator[StepParts]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from regate_ds.adapters.megatron import attach

        schedule, regate = get_forward_backward_func(), None
        if name != HOST:
            config = self._arms[name].config(self._case)
            reference: Any = self._data if config.needs_reference else None
            regate = attach([self._chunk], config, total_steps=ENDLESS, reference=reference)
            schedule = regate.wrap(schedule)
        try:
            yield StepParts(
                plan=lambda: None,
                passes=lambda *_: self._passes(schedule),
                end=lambda *_: None if regate is None else regate.step(applied=True),
                followed=partial(plans_followed, regate, self._batches),
            )
        finally:
            if regate is not None:
                regate.remove()
            self._chunk.zero_grad_buffer()

    def _passes(self, schedule: Any) -> Any:
        return schedule(
            forward_step_func=_forward_step,
            data_iterator=iter(as_loaded(self._batches)),
            model=self._chunk,
            num_microbatches=len(self._batches),
            seq_length=self._case.tokens,
            micro_batch_size=self._case.samples,
            forward_only=False,
        )


def _chunk(case: StepCase, device: torch.device) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.transformer.module import Float16Module

    from regate_ds.recipe.engines.megatron.chunks import decoder_config
    from regate_ds.recipe.engines.megatron.decoder import gpt_chunk

    parallel = ParallelConfig(
        tensor=case.tensor,
        pipeline=case.pipeline,
        sequence=case.sequence,
        recompute="full" if case.recompute else "none",
    )
    config = decoder_config(case.llama(), parallel, case.dtype)
    chunk: Any = gpt_chunk(case.llama(), config).to(device).train()
    chunk.model_type = ModelType.encoder_or_decoder
    inner = Float16Module(config, chunk) if config.bf16 else chunk
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    return DistributedDataParallel(config, settings, inner)


def _forward_step(iterator: Iterator[Batch], model: nn.Module) -> Any:
    """Run the next micro-batch as a user's own forward step does."""
    batch = next(iterator)
    ids_BT = batch.inputs["input_ids"]
    labels_BT = batch.tokens.labels_BT.to(ids_BT.device)
    positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    output = model(ids_BT, positions_BT, None, labels=labels_BT.clamp(min=0))

    def loss(losses_BT: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        is_label_BT = labels_BT >= 0
        total, count = (losses_BT.float() * is_label_BT).sum(), is_label_BT.sum()
        return total, count.int(), {"lm loss": total.detach()}

    return output, loss
