"""Gradients of two ranks with different work against one process on the joint batch."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.adapters.torch.attach import attach
from regate_ds.adapters.window import PLAN
from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.job.process import start_process
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.adapters.deepspeed.zero_cases_helper import CASES, RANKS, ZeroCase
from tests.support.measure import Gradients, assert_gradients_equal, gradients
from tests.support.stores import RandomReference, index_of

TOLERANCE = 1e-5


NUM_STEPS = 4


def reference_of(case: ZeroCase) -> RandomReference:
    """Random losses for every label position of all ranks' samples."""
    return RandomReference(index_of(b.tokens for rank in RANKS for b in case.batches(rank)))


@lru_cache(maxsize=1)
def joint_gradients(case: ZeroCase) -> tuple[Gradients, list[torch.Tensor]]:
    """The same step in one process: the sum over all micro-batches over the joint count.

    Also the losses of each micro-batch, rank by rank.
    """
    store = reference_of(case)
    columns = {one.name: one.unseen for one in case.config.statistics}
    stores = Stores(store, DifficultyStore(store.index, columns=columns))
    session = Regate(case.config, stores, total_steps=NUM_STEPS)
    batches = [batch for rank in RANKS for batch in case.batches(rank)]
    step = session.plan_step([batch.tokens for batch in batches])
    model = case.model()
    config = case.config
    attach_model(model, config)
    losses = []
    for batch, plan in zip(batches, step.micro, strict=True):
        output = model(**batch.inputs, regate_plan=plan)
        (output.loss_sum / step.num_targets_global).backward()
        losses.append(output.losses.detach())
    return gradients(model), losses


def zero_settings(stage: int, accumulation: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed 0.19.8 clips at 1.0 unless told otherwise; the one process does not clip.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        # Allowed beside ZeRO, which would rather know all of its optimizers.
        "zero_allow_untested_optimizer": True,
    }


def start_engine(model: torch.nn.Module, stage: int, accumulation: int, lr: float = 0.05) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    settings = zero_settings(stage, accumulation)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def engine_gradients(rank: int, case: ZeroCase) -> tuple[Gradients, list[torch.Tensor]]:
    """What the optimizer of the rank's engine is given, gathered from all ranks.

    Also the losses of each of the rank's micro-batches.
    """
    model = case.model()
    options = {"reference": reference_of(case), "own_loss": case.own_loss}
    regate = attach(model, case.config, total_steps=NUM_STEPS, **options)
    engine = start_engine(model, case.stage, case.accumulation)
    (window,) = regate.windows(case.batches(rank), engine)
    counts, losses = regate.metrics(), []
    elides = case.config.chooses_images or isinstance(case.config.execution, RandomLtd)
    assert (counts["image_kept"] < counts["image_total"]) == (elides and counts["image_total"] > 0)
    for number, inputs in enumerate(window, start=1):
        if rank == RANKS[-1] and case.targets_of_last_rank is not None:
            assert inputs[PLAN].num_targets == case.targets_of_last_rank
        output = engine(**inputs)
        losses.append(output.losses.detach().clone())
        engine.backward(loss_of(regate, output, case))
        if number < case.accumulation:
            engine.step()
    found = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
    found = {name: g.clone() for name, g in found.items() if g is not None}
    engine.step()
    regate.step(applied=engine.was_step_applied())
    engine.destroy()
    return found, losses


def loss_of(regate: Any, output: Any, case: ZeroCase) -> torch.Tensor:
    if not case.own_loss:
        return regate.loss(output)
    losses_L, weights_L = regate.token_losses(output)
    return (losses_L * weights_L).sum()


def check_gradients(rank: int, case: ZeroCase) -> None:
    (found, losses), (wanted, all_losses) = engine_gradients(rank, case), joint_gradients(case)
    for number, wanted_L in enumerate(all_losses[rank * case.accumulation :][: case.accumulation]):
        assert torch.allclose(losses[number], wanted_L, rtol=TOLERANCE, atol=TOLERANCE), number
    # What no loss reaches has no gradient in one process and, under some stages, one of 0 here.
    names = found.keys() | wanted.keys()
    zeros = {name: torch.zeros(()) for name in names}
    shared = found.keys() & wanted.keys()
    assert not any(bool({**zeros, **found}[name].any()) for name in names - wanted.keys())
    assert not any(bool({**zeros, **wanted}[name].any()) for name in names - found.keys())
    assert_gradients_equal(
        {name: found[name] for name in shared}, {name: wanted[name] for name in shared}, TOLERANCE
    )


def run_named(rank: int, folder: str, checks: dict[str, Callable[[], None]]) -> None:
    """Write what failed, by name. After a failed assertion the ranks are still in step."""
    outcome = {}
    for name, check in checks.items():
        try:
            check()
        except AssertionError:
            outcome[name] = traceback.format_exc()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(outcome))


def check_all_gradients(rank: int, folder: str) -> None:
    start_process()
    checks = {name: lambda case=case: check_gradients(rank, case) for name, case in CASES.items()}
    run_named(rank, folder, checks)
