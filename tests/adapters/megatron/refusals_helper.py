"""What is refused, and that a refusal leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from torch import nn

from regate_ds.adapters.megatron import attach
from regate_ds.teacher.online import OnlineReference
from tests.adapters.megatron import build_helper
from tests.adapters.megatron.build_helper import build, join
from tests.adapters.megatron.cases_helper import TOTAL_STEPS, Case, items
from tests.adapters.megatron.checks_helper import (
    attached,
    dismantle,
    forward_step,
    run_chunks,
)

HOST = {
    "calculate_per_token_loss": False,
    "mtp_num_layers": 1,
    "experimental_attention_variant": "dsa",
    "apply_rope_fusion": True,
    "window_size": (8, 0),
    "heterogeneous_block_specs": True,
    "fp8_multi_head_attention": True,
    "overlap_moe_expert_parallel_comm": True,
    "hybrid_context_parallel": True,
    "cpu_offloading": True,
    "fine_grained_activation_offloading": True,
    "cuda_graph_impl": "local",
    "tp_comm_overlap": True,
    "variable_seq_lengths": True,
    "distribute_saved_activations": True,
}
"""Values of the host's configuration of which any one is refused by name."""


@contextmanager
def refused(error: type[Exception], pattern: str) -> Iterator[None]:
    try:
        yield
    except error as problem:
        text = str(problem)
        assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"
        assert "\n" not in text
        return
    raise AssertionError(f"nothing was refused about {pattern!r}")


@contextmanager
def changed(target: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(target, name)
    setattr(target, name, value)
    yield
    setattr(target, name, before)


def data_of(case: Case) -> Iterator[Any]:
    return iter(items(case, mpu.get_data_parallel_rank()))


def num_hooks(chunks: list[Any]) -> int:
    modules: list[nn.Module] = [m for chunk in chunks for m in chunk.modules()]
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)


def check_attach(case: Case) -> None:
    join(case)
    chunks = build(case)
    gpt, before = chunks[0].module, num_hooks(chunks)

    def tried(**changes: Any) -> Any:
        rows = replace(case, row_format=changes.pop("row_format", case.row_format))
        return attached(rows, chunks, replace(case.config, **changes))

    for name, value in HOST.items():
        if hasattr(gpt.config, name):
            fp8 = changed(gpt.config, "fp8", "hybrid" if "fp8" in name else None)
            with fp8, changed(gpt.config, name, value), refused(ValueError, name):
                tried()
    learned = changed(gpt, "position_embedding_type", "learned_absolute")
    with learned, refused(ValueError, "'learned_absolute'"):
        tried()
    other = changed(gpt, "rotary_pos_emb", nn.Identity())
    with other, refused(ValueError, "rotary_pos_emb is of class Identity, whose angles"):
        tried()
    gathering = changed(gpt.config, "moe_token_dispatcher_type", "allgather")
    with changed(gpt.config, "num_moe_experts", 4), gathering, refused(ValueError, "'alltoall'"):
        tried()
    attention = gpt.decoder.layers[0].self_attention
    with changed(attention, "attn_mask_type", AttnMaskType.no_mask), refused(ValueError, "no_mask"):
        tried()
    with refused(ValueError, "row_format='ragged' needs an attention"):
        tried(row_format="ragged")
    divided = changed(chunks[0].buffers[0], "gradient_scaling_factor", 0.5)
    with divided, refused(ValueError, "before the model is wrapped"):
        tried()
    with refused(ValueError, "decoder of 4 layers"):
        tried(first_layer=4)
    online = OnlineReference(lambda _: torch.empty(0), lambda _: [], teacher_id="none")
    with refused(ValueError, "this online teacher knows no data beforehand, .* give it an index"):
        attach(chunks, case.config, total_steps=TOTAL_STEPS, reference=online)
    with refused(ValueError, "holds 0 GPTModels"):
        attached(case, [nn.Linear(2, 2)])
    assert num_hooks(chunks) == before
    check_attached(case, chunks, tried)
    assert num_hooks(chunks) == before
    dismantle(chunks)


def check_attached(case: Case, chunks: list[Any], tried: Callable[..., Any]) -> None:
    """What is refused once ``tried`` has attached: schedules, items, and steps out of order."""
    gpt = chunks[0].module
    with changed(gpt.config, "fp8", "hybrid"):
        regate = tried()
    # Its kernels cannot run here: what is planned for them fits.
    window = [item.tokens for item in items(case, 0)]
    plan = regate._attached.planner.plan_step(lambda: window)
    assert all(micro.num_slots % 16 == 0 for micro in plan.micro)
    regate.remove()
    regate = tried()
    with refused(RuntimeError, "already attached"):
        tried()
    with refused(ValueError, "p2p_communicator, pg_collection"):
        regate.wrap(lambda forward_step_func: None)
    schedule = regate.wrap(get_forward_backward_func())
    with refused(RuntimeError, "did not call the model"):
        run_chunks(case, chunks, schedule, lambda iterator, model: (next(iterator), None))
    assert all(gate.pending is None for gate in regate._attached.gates)
    with refused(ValueError, "not attached to"):
        run_chunks(case, build(case), schedule, forward_step(case))
    with refused(ValueError, "no labels, loss_mask, regate_key; wrap the data set in Keyed"):
        schedule(data_iterator=iter([{}]), num_microbatches=1)
    with refused(ValueError, "is a list without .tokens"):
        schedule(data_iterator=iter([[]]), num_microbatches=1)
    longer = replace(case, length=case.length + 4)
    with refused(ValueError, r"given \(28, 2\) rows .* plan is of \(24, 2\)"):
        run_chunks(
            case, chunks, schedule, lambda _, model: forward_step(case)(data_of(longer), model)
        )
    unset = changed(gpt.config, "finalize_model_grads_func", None)
    with unset, refused(ValueError, "finalize_model_grads_func"):
        run_chunks(case, chunks, schedule, forward_step(case))
    run_chunks(case, chunks, schedule, forward_step(case))
    assert regate.run is not None
    with changed(gpt.config, "pipeline_dtype", None):
        assert regate.run.expected_bytes() == (0, 0)
    regate.step(applied=True)
    with refused(RuntimeError, "no step is planned"):
        regate.step(applied=True)
    regate.remove()


def check_positions(case: Case) -> None:
    """Of a model with three axes of positions."""
    join(case)
    chunks = build(case)
    schedule = attached(case, chunks).wrap(get_forward_backward_func())
    what = r"position_ids \(2, 24\), but position_embedding_type='mrope' needs \(3, 2, 24\)"
    with refused(ValueError, what):
        run_chunks(case, chunks, schedule, forward_step(replace(case, positions="rope")))
    dismantle(chunks)


def check_samples(case: Case) -> None:
    """Of a plan whose samples are not those of the model's call."""
    join(case)
    chunks = build(case)
    schedule = attached(case, chunks).wrap(get_forward_backward_func())
    what = r"plan has 3 samples in 1 rows, but the model is called without packed_seq_params"
    with refused(ValueError, what):
        run_chunks(case, chunks, schedule, forward_step(replace(case, packed=False)))
    step = forward_step(case)

    def other(iterator: Any, model: Any) -> Any:
        """Joins the first two samples of the row, as where the bounds are of another batch."""

        def call(*told: Any, packed_seq_params: Any, **named: Any) -> Any:
            packed_seq_params.cu_seqlens_q = packed_seq_params.cu_seqlens_q[[0, 2, 3]]
            return model(*told, packed_seq_params=packed_seq_params, **named)

        return step(iterator, call)

    what = r"samples have the bounds \[0, \d+, 24\] .* those of the plan start at \[0, \d+, \d+\]"
    with refused(ValueError, what):
        run_chunks(case, chunks, schedule, other)
    dismantle(chunks)


def check_latent(case: Case) -> None:
    """Of latent attention on tensor ranks, where Megatron's own gradient lacks a part."""
    join(case)
    chunks = build(case)
    whole = changed(chunks[0].config, "sequence_parallel", False)
    with whole, refused(ValueError, "and sequence_parallel=False: Megatron-core's own gradients"):
        attached(case, chunks)
    with changed(build_helper, "WholeLinear", ColumnParallelLinear):
        cut = build(case)
    with refused(ValueError, "and linear_kv_down_proj of class ColumnParallelLinear: Megatron"):
        attached(case, cut)
    dismantle([*chunks, *cut])


def check_virtual_range(case: Case) -> None:
    join(case)
    chunks = build(case)
    config, uneven = chunks[0].config, "num_layers_in_first_pipeline_stage"
    with changed(config, uneven, 2), refused(ValueError, uneven):
        attached(case, chunks)
    with refused(ValueError, "last_layer=3 ends before the depth"):
        attached(case, chunks, replace(case.config, last_layer=3))
    with refused(ValueError, "first virtual chunk"):
        attached(case, chunks, replace(case.config, first_layer=3))
    dismantle(chunks)


def check_merging(case: Case) -> None:
    """What tokens cannot be one in; nothing of it is left in the model."""
    join(case)
    for other, reason in (
        (replace(case, row_format="ragged"), "attach with row_format='padded'"),
        (replace(case, positions="mrope"), "position_embedding_type='mrope'"),
    ):
        chunks = build(other)
        with refused(ValueError, f"merged steps: .*{reason}.*, or set merge.steps=0"):
            attached(other, chunks)
        assert "forward" not in vars(chunks[0].module)
        dismantle(chunks)
    chunks = build(case)
    gpt = chunks[0].module
    gpt.decoder._deepstack_process = print
    gpt.config.vision_config = SimpleNamespace(deepstack_visual_indexes=[0, 1])
    with refused(ValueError, "merged steps: the decoder adds features of images"):
        attached(case, chunks)
    dismantle(chunks)


def check_steps(case: Case) -> None:
    """An error where one replica's plan is made, or its step ends, is one on all ranks, at once."""
    join(case)
    chunks = build(case)
    regate = attached(case, chunks)
    schedule = regate.wrap(get_forward_backward_func())
    data_rank = mpu.get_data_parallel_rank()
    planner = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0
    culprit, data = planner and data_rank == 1, items(case, data_rank)

    def run(micro: list[Any]) -> None:
        schedule(
            forward_step_func=forward_step(case),
            data_iterator=iter(micro),
            model=chunks[0],
            num_microbatches=case.num_micro,
            seq_length=case.length,
            micro_batch_size=case.rows,
        )

    def failing(error: type[Exception], own: str) -> Any:
        if culprit:
            return refused(error, own)
        return refused(RuntimeError, "1 other data rank" if planner else "has failed")

    with failing(ValueError, "ended after 1 of a step's 4"):
        run(data[:1] if data_rank == 1 else data)
    run_chunks(case, chunks, schedule, forward_step(case))
    with failing(RuntimeError, "not ended"):
        run(list(reversed(data)) if data_rank == 1 else data)
    assert regate.run is not None
    if culprit:
        regate.run.losses[0].fill_(float("nan"))
    with failing(RuntimeError, "diverged"):
        regate.step(applied=True)
    torch.distributed.barrier()
    dismantle(chunks)
