"""DeepSpeed on one rank: a bf16 step under ZeRO-2, and runs in which ReGATE is switched off."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.adapters.torch.attach import attach
from regate_ds.algorithm.batch import host_labels
from regate_ds.config import RegateConfig
from regate_ds.data.collate import Batch
from regate_ds.job.process import start_process
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.gpu.check_helper import DTYPES, Check, Measured, num_different
from tests.gpu.decoder_helper import MOST_IN_BF16
from tests.gpu.place_helper import join_alone, plainly_repeatable
from tests.support.batches import random_batch
from tests.support.measure import Gradients, gradients, relative_error
from tests.support.models import causal_lm
from tests.support.stores import RandomReference, index_of

NUM_STEPS = 3
CONFIG = RegateConfig(schedule=ScheduleConfig(warmup=0, final_dense_share=0.0))


def oracle(device: torch.device) -> Iterator[Check]:
    yield Check("a step under ZeRO-2 through attach", "bf16", partial(zero_step, device, 2))


def zero(device: torch.device) -> Iterator[Check]:
    for stage in (0, 1, 2, 3):
        title = f"a step under ZeRO-{stage} through attach"
        yield Check(title, "bf16", partial(zero_step, device, stage))


def off(device: torch.device) -> Iterator[Check]:
    for name, dtype in DTYPES.items():
        title = f"{NUM_STEPS} steps under ZeRO-2 with enabled=False: weights and losses"
        yield Check(title, name, partial(disabled_run, device, dtype))


def micro_batch() -> Batch:
    ids_BT, tokens = random_batch([[24], [17]], seed=1)
    return Batch({"input_ids": ids_BT}, tokens)


def zero_step(device: torch.device, stage: int) -> Measured:
    """Error of the gradients that DeepSpeed's optimizer is given, against one fp32 process.

    Allowed is twice the error of a bf16 process without an engine, and 2^-8, the rounding of one
    number. Infinite where the step leaves a weight that is not finite, or all as they were.
    """
    low = causal_lm().to(device, torch.bfloat16)
    high = copy.deepcopy(low).float()
    wanted, alone = (planned_gradients(copy.deepcopy(m), device) for m in (high, low))
    own = relative_error(alone, wanted)
    before = [p.detach().clone() for p in low.parameters()]
    found = engine_gradients(low, device, stage)
    after = list(low.parameters())
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    is_finite = all(bool(p.isfinite().all()) for p in after)
    error = relative_error(found, wanted) if moved and is_finite else math.inf
    return Measured(error, min(2 * own + 2**-8, MOST_IN_BF16), f"without an engine {own:.1e}")


def planned_gradients(model: nn.Module, device: torch.device) -> Gradients:
    batch = micro_batch()
    reference = RandomReference(index_of([batch.tokens]))
    stores = Stores(reference, DifficultyStore(reference.index))
    session = Regate(CONFIG, stores, total_steps=NUM_STEPS)
    step = session.plan_step([batch.tokens])
    attach_model(model, CONFIG)
    output = model(**batch.to(device).inputs, regate_plan=step.micro[0].to(device))
    (output.loss_sum / step.num_targets_global).backward()
    return gradients(model)


def engine_gradients(model: nn.Module, device: torch.device, stage: int) -> Gradients:
    batch = micro_batch()
    join_alone(device)
    start_process()
    reference = RandomReference(index_of([batch.tokens]))
    regate = attach(model, CONFIG, total_steps=NUM_STEPS, reference=reference)
    engine = start_engine(model, torch.bfloat16, stage)
    (window,) = regate.windows([batch], engine)
    (inputs,) = window
    engine.backward(regate.loss(engine(**inputs)))
    found = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
    engine.step()
    regate.step(applied=engine.was_step_applied())
    engine.destroy()
    return found


def start_engine(model: nn.Module, dtype: torch.dtype, stage: int = 2) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        # DeepSpeed 0.19.8 clips at 1.0 unless told otherwise.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def disabled_run(device: torch.device, dtype: torch.dtype) -> Measured:
    """Elements of weights and losses that differ from a loop that has never heard of us."""
    join_alone(device)
    start_process()
    host = causal_lm().to(device, dtype)
    ours = copy.deepcopy(host)
    with plainly_repeatable():
        expected = _plain_losses(host, dtype)
        found = _disabled_losses(ours, dtype)
    num_wrong = num_different({"losses": found}, {"losses": expected})
    num_wrong += num_different(dict(ours.named_parameters()), dict(host.named_parameters()))
    return Measured(num_wrong, 0.0)


def _labelled() -> Batch:
    batch = micro_batch()
    labels_BT = host_labels(batch.tokens.labels_BT)
    return Batch({**batch.inputs, "labels": labels_BT}, batch.tokens)


def _plain_losses(model: nn.Module, dtype: torch.dtype) -> Tensor:
    engine, losses = start_engine(model, dtype), []
    for _ in range(NUM_STEPS):
        loss = engine(**_labelled().to(engine.device).inputs).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    engine.destroy()
    return torch.stack(losses)


def _disabled_losses(model: nn.Module, dtype: torch.dtype) -> Tensor:
    regate = attach(model, RegateConfig(enabled=False), total_steps=NUM_STEPS)
    engine, losses = start_engine(model, dtype), []
    for window in regate.windows([_labelled()] * NUM_STEPS, engine):
        for inputs in window:
            loss = regate.loss(engine(**inputs))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        regate.step(applied=engine.was_step_applied())
    engine.destroy()
    return torch.stack(losses)
