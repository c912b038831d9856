"""What the host computes is the host's own wherever elision does nothing, bit for bit."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from regate_ds.adapters.megatron import attach
from regate_ds.adapters.megatron.samples import ImageTokens, image_numbers, with_images
from regate_ds.algorithm.batch import IGNORE
from regate_ds.config import RegateConfig
from regate_ds.parallel import resharding as routes
from tests.adapters.megatron.build_helper import build, fill, gpt, host_config, join, wrapped
from tests.adapters.megatron.cases_helper import BRIDGED, HIDDEN, TOTAL_STEPS, Case, items
from tests.adapters.megatron.checks_helper import (
    attached,
    cut,
    dismantle,
    forward_step,
    run_chunks,
)
from tests.adapters.megatron.llava_helper import ImageItem
from tests.support.stores import read_difficulty

Gradients = dict[str, Tensor]


def host_step(case: Case) -> Any:
    """A forward step with a loss of the host's own: over all label positions."""

    def step(iterator: Any, model: Any) -> Any:
        item = next(iterator)
        ids_BT = cut(item.ids_BT, case.cp)
        positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        if case.model in BRIDGED:
            return model(**item.inputs), of_logits
        if isinstance(item, ImageItem):
            output, _ = model(item.images, ids_BT, positions, None)
            return output, of_logits
        is_label, labels_BT = (
            cut(x, case.cp) for x in (item.tokens.is_label_BT, item.tokens.labels_BT.clamp(min=0))
        )
        output = model(ids_BT, positions, None, labels=labels_BT)

        def loss(losses_BT: Tensor) -> Any:
            total = (losses_BT * is_label).sum()
            return total, is_label.sum().int(), {"lm loss": total.detach()}

        return output, loss

    return step


def of_logits(logits_BTV: Tensor) -> Any:
    total = logits_BTV.float().square().sum()
    return total, torch.tensor(logits_BTV.shape[1], dtype=torch.int), {"lm loss": total.detach()}


def gradients(chunks: list[Any]) -> Gradients:
    return {
        f"{i}.{name}": parameter.main_grad.clone()
        for i, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
    }


def require_equal(found: Gradients, wanted: Gradients) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, f"not bit for bit: {different[:5]}"


def check_disabled(case: Case) -> None:
    """Never attached, switched off, and taken off again: losses and gradients are the same."""
    join(case)
    chunks = build(case)
    schedule, results = get_forward_backward_func(), []
    hooks = [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]

    def result(wrapped: Any) -> tuple[Any, Gradients]:
        losses = run_chunks(case, chunks, wrapped, host_step(case))
        return losses, gradients(chunks)

    results.append(result(schedule))
    off = attach(chunks, RegateConfig(enabled=False), total_steps=TOTAL_STEPS)
    results.append(result(off.wrap(schedule)))
    assert off.metrics() == {}
    on = attached(case, chunks)
    planned = on.wrap(schedule)
    on.remove()
    results.append(result(on.wrap(schedule)))
    results.append(result(planned))
    assert hooks == [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]
    (losses, wanted), *others = results
    for found_losses, found in others:
        assert found_losses == losses
        require_equal(found, wanted)
    dismantle(chunks)


def decoder_outputs(case: Case, chunks: list[Any], schedule: Any, step: Any) -> list[Tensor]:
    """What the decoders of this rank put out, in order."""
    seen: list[Tensor] = []
    handles = []
    for chunk in chunks:
        decoder = getattr(chunk.module, "language_model", chunk.module).decoder

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            seen.append(output.detach().clone())

        handles.append(decoder.register_forward_hook(hook, prepend=True))
    run_chunks(case, chunks, schedule, step)
    for handle in handles:
        handle.remove()
    return seen


def check_dense(case: Case) -> None:
    """In a dense step the decoder's output is the host's, in evaluation all is."""
    join(case)
    chunks = build(case)
    schedule = get_forward_backward_func()
    wanted = decoder_outputs(case, chunks, schedule, host_step(case))
    dense = replace(case, dense=True)
    regate = attached(dense, chunks)
    found = decoder_outputs(case, chunks, regate.wrap(schedule), forward_step(case))
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    evaluated = run_chunks(case, chunks, regate.wrap(schedule), host_step(case), forward_only=True)
    regate.remove()
    plain = run_chunks(case, chunks, schedule, host_step(case), forward_only=True)
    assert evaluated == plain
    dismantle(chunks)


def check_bytes(case: Case) -> tuple[int, int]:
    """(bytes that this rank sent to its neighbours, what the plan says)"""
    join(case)
    chunks = build(case)
    regate = attached(case, chunks)
    run_chunks(case, chunks, regate.wrap(get_forward_backward_func()), forward_step(case))
    assert regate.run is not None
    sent = regate.run.sent_bytes()
    expected = sum(regate.run.expected_bytes())
    dismantle(chunks)
    return sent, expected


def check_frozen(case: Case) -> None:
    """Frozen embeddings change no other gradient, and leave no message behind."""
    join(case)
    chunks = build(case)
    regate = attached(case, chunks)
    schedule, found = regate.wrap(get_forward_backward_func()), []
    for frozen in (False, True):
        for chunk in chunks:
            if hasattr(chunk.module, "embedding"):
                chunk.module.embedding.requires_grad_(not frozen)
        # Not ended, so that the same step is planned again.
        run_chunks(case, chunks, schedule, forward_step(case))
        every = gradients(chunks)
        found.append({name: value for name, value in every.items() if "embedding" not in name})
    require_equal(*found)
    dismantle(chunks)


def check_overlap(case: Case) -> None:
    """Ragged rows in transfers behind the computation: no bit changes."""
    join(case)
    found = []
    # Gloo reads what it sends later: Megatron's own run is wrong there if that is let go of.
    for more in ({}, {"overlap_p2p_comm": True, "deallocate_pipeline_outputs": False}):
        chunks = build(case, **more)
        regate = attached(case, chunks)
        run_chunks(case, chunks, regate.wrap(get_forward_backward_func()), forward_step(case))
        found.append(gradients(chunks))
        dismantle(chunks)
    require_equal(*found)


def check_image_labels(case: Case) -> None:
    """Three images in a row, two of which touch, one or none in others, cut or not.

    Labels and numbers of images against what LLaVAModel makes of images filled with their numbers.
    """
    join(case)
    chunks = build(case)
    model: Any = chunks[0].module
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (3, 12), generator=generator)
    ids[0, 0] = ids[0, 6] = ids[0, 7] = ids[1, 11] = DEFAULT_IMAGE_TOKEN_INDEX
    labels = torch.randint(1, 50, (3, 12), generator=generator)
    mask = (torch.rand(3, 12, generator=generator) < 0.7).float()
    size = model.img_seq_len
    image = ImageTokens(placeholder=DEFAULT_IMAGE_TOKEN_INDEX, num_positions=size)
    numbers = torch.tensor([0.0, 1.0, 2.0, 0.0])[None, :, None].expand(size, -1, HIDDEN)
    for length in (15, case.length):
        model._language_max_sequence_length = length
        for pads in (False, True):
            model._language_is_pipeline_parallel = pads
            merged_TBH, found, found_mask = model._preprocess_data(
                numbers + 1,
                torch.zeros(3, 12, HIDDEN),
                ids,
                mask,
                labels,
                False,
                None,
                DEFAULT_IMAGE_TOKEN_INDEX,
                torch.ones(4, dtype=torch.int),
            )
            wanted = found.masked_fill(found_mask <= 0, IGNORE)
            own = labels.masked_fill(mask <= 0, IGNORE)
            mine = with_images(own, ids, replace(image, max_length=length, pads=pads))
            assert torch.equal(mine, wanted), f"length {length}, pads {pads}"
            image_BT = image_numbers(ids, image, mine.shape[1])
            assert torch.equal(image_BT, merged_TBH[:, :, 0].T.long() - 1)
    dismantle(chunks)


def check_memory(case: Case) -> None:
    """A skipped step changes no difficulty, a replayed one counts once; resume knows all of it."""
    join(case)
    chunks = build(case)
    regate = attached(case, chunks)
    wrapped = regate.wrap(get_forward_backward_func())

    def difficulty() -> Tensor | None:
        planner = regate._attached.planner
        if planner is None:
            return None
        mine = items(case, mpu.get_data_parallel_rank())
        store = planner.opened.difficulty
        assert store is not None
        return read_difficulty(store, [k for item in mine for k in item.tokens.flat_keys])

    def step(*, applied: bool, times: int = 1) -> Tensor | None:
        for _ in range(times):
            run_chunks(case, chunks, wrapped, forward_step(case))
        regate.step(applied=applied)
        return difficulty()

    before = difficulty()
    skipped = step(applied=False)
    once = step(applied=True, times=2)
    folder = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else ""]
    torch.distributed.broadcast_object_list(folder)
    regate.save(Path(folder[0]))
    torch.distributed.barrier()
    regate.remove()
    regate = attached(case, chunks)
    # A step that is open when the run goes back is forgotten.
    run_chunks(case, chunks, regate.wrap(get_forward_backward_func()), forward_step(case))
    regate.load(Path(folder[0]))
    restored = difficulty()
    regate.save(Path(folder[0]))
    if before is not None:
        assert torch.equal(before, skipped)
        assert not torch.equal(once, skipped)
        assert torch.equal(once, restored)
        # One update from 0: (1 - 0.9) of a loss, never more.
        losses = torch.cat(list(regate_losses(case)))
        assert float(once.max()) <= 0.1 * float(losses.max()) * 1.001
        assert regate._attached.planner.opened.session.step == 2
    dismantle(chunks)


def plain_losses(case: Case) -> list[float]:
    return torch.cat(regate_losses(case)).tolist()


def regate_losses(case: Case) -> list[Tensor]:
    from tests.adapters.megatron.checks_helper import plain_model, plans_of
    from tests.adapters.megatron.plain_gpt_helper import batch_losses

    _, plan, _ = plans_of(case)
    model = plain_model(case)
    flat = [item for rank in range(case.dp) for item in items(case, rank)]
    with torch.no_grad():
        return [
            batch_losses(model, item, micro) for item, micro in zip(flat, plan.micro, strict=True)
        ]


def check_activations(case: Case) -> tuple[int, int]:
    """(bytes that the decoder's layers save for the backward pass, rows that they see)"""
    join(case)
    chunks = build(case)
    regate = attached(case, chunks)
    saved: dict[tuple[int, int], int] = {}
    weights = {p.untyped_storage().data_ptr() for c in chunks for p in c.parameters()}
    inside: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in weights:
            saved[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    # Held, so that no address is used twice.
    kept: list[Tensor] = []
    for chunk in chunks:
        decoder = getattr(chunk.module, "language_model", chunk.module).decoder
        decoder.register_forward_pre_hook(lambda *_: inside.append(True), prepend=True)
        decoder.register_forward_hook(lambda *_: inside.clear(), prepend=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_chunks(case, chunks, regate.wrap(get_forward_backward_func()), forward_step(case))
    assert regate.run is not None
    rows = 0
    for local in regate.run.micro:
        full, few = local.full_shape[0], local.kept_shape[0]
        num_gated = (case.last_layer or case.num_layers) - case.first_layer
        rows += (case.num_layers - num_gated) * full + num_gated * few
    dismantle(chunks)
    return sum(saved.values()), rows


def check_gathered(case: Case) -> tuple[int, int, int]:
    """(exchanges of rows, bytes that left this rank in them, what the step says of one way)"""
    join(case)
    chunks = build(case)
    regate = attached(case, chunks)
    exchange, counted = routes.exchange_tensors, []

    def counting(rows_NH: Tensor, num_sent: list[int], *rest: Any) -> Tensor:
        if rest[-1] is None:
            return exchange(rows_NH, num_sent, *rest)
        leaving = sum(num_sent) - num_sent[mpu.get_context_parallel_rank()]
        counted.append(leaving * rows_NH.shape[1] * rows_NH.element_size())
        return exchange(rows_NH, num_sent, *rest)

    routes.exchange_tensors = counting
    try:
        run_chunks(case, chunks, regate.wrap(get_forward_backward_func()), forward_step(case))
    finally:
        routes.exchange_tensors = exchange
    assert regate.run is not None
    said = regate.run.gathered_bytes()
    dismantle(chunks)
    return len(counted), sum(counted), said


def check_training(case: Case) -> list[float]:
    """Mean loss of each of four steps of Megatron's own optimizer: two dense, two sparse."""
    join(case)
    chunks = build(case)
    two_dense = replace(case.config.schedule, warmup=2)
    regate = attached(case, chunks, replace(case.config, schedule=two_dense))
    schedule = regate.wrap(get_forward_backward_func())
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.02,
        clip_grad=1.0,
        weight_decay=0.0,
        use_distributed_optimizer=case.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        reports = run_chunks(case, chunks, schedule, forward_step(case))
        applied, _, _ = optimizer.step()
        regate.step(applied=applied)
        total = sum(report["lm loss"] for report in reports) if reports else torch.zeros(2)
        losses.append(float(total[0] / total[1].clamp(min=1)))
    metrics = regate.metrics()
    assert (metrics["step"], metrics["dense"]) == (3, False)
    dismantle(chunks)
    return losses


def check_half(case: Case) -> list[float]:
    """Losses of the step's targets in bf16, through Float16Module."""
    join(case)
    config = host_config(
        case, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16
    )
    chunk = gpt(case, config, None)
    chunk.model_type = None
    fill(chunk)
    chunks = [wrapped(case, config, Float16Module(config, chunk))]
    regate = attached(case, chunks)
    run_chunks(case, chunks, regate.wrap(get_forward_backward_func()), forward_step(case))
    regate.step(applied=True)
    assert all(p.main_grad.isfinite().all() for p in chunk.parameters())
    assert regate.run is not None
    losses = torch.cat([*regate.run.losses.values(), torch.zeros(0)])
    dismantle(chunks)
    return losses.tolist()
