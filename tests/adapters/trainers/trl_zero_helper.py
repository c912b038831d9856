"""TRL's SFTTrainer with ReGATE under DeepSpeed, on the ranks of a job that has begun."""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch.distributed as dist
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTTrainer

from regate_ds import RegateConfig
from regate_ds.adapters.trainers.trl_sft import RegateSFTTrainer
from tests.adapters.trainers.sft_helper import oracle
from tests.adapters.trainers.trl_helper import (
    UNREACHED,
    Ended,
    SftCase,
    Watching,
    assert_same_run,
    picture_talks,
)
from tests.support.measure import assert_gradients_equal

RATE = 8.0
"""So large that what a step of SGD moves is not lost in the rounding of the weights."""


def case_under(stage: int, *, blind: tuple[int, ...] = ()) -> SftCase:
    """``blind``: the samples without an image."""
    settings = {
        "assistant_only_loss": True,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
        },
    }
    knobs = {"images.keep_share": 0.5}
    return SftCase(partial(picture_talks, blind=blind), settings, sees=True, knobs=knobs)


def check_trl(rank: int, folder: Path) -> None:
    """All checks, one after the other in the same processes."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with mock.patch.dict(os.environ, CI="1"):  # without telemetry
        check_off_under_zero(2, folder / "off")
        for stage in (2, 3):
            check_under_zero(stage, folder / str(stage))


def check_under_zero(stage: int, folder: Path) -> None:
    """A sparse step moves each weight by the gradient of the oracle on the joint batch; the second
    rank sees no image, and other numbers of tokens."""
    case = case_under(stage, blind=(1, 3))
    trainer = Watching(**case.given(folder), **case.regate(folder))
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.model_wrapped.zero_optimization_stage() == stage
    assert not trainer.regate.metrics()["dense"]
    found = {name: (start[name] - end) / RATE for name, end in ends(trainer.model).items()}
    own = list(zip(trainer.seen, trainer.regate.plan.micro, strict=True))
    assert all(("pixel_values" in batch.inputs) == (dist.get_rank() == 0) for batch, _ in own)
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, own)
    loss, wanted = oracle(trainer.exact, [one for part in parts for one in part])
    reached = {name: grad for name, grad in found.items() if UNREACHED not in name}
    assert_gradients_equal(reached, wanted, 1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-6)
    del trainer
    forget()


def check_off_under_zero(stage: int, folder: Path) -> None:
    case = case_under(stage)
    more = {"max_steps": 2, "learning_rate": 0.05}
    plain = Ended(SFTTrainer, case.given(folder, **more))
    off = {"regate": RegateConfig(enabled=False)}
    assert_same_run(Ended(RegateSFTTrainer, {**case.given(folder, **more), **off}), plain)
    forget()


def ends(model: Any) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


def forget() -> None:
    """Else the next model of this process would be made as ZeRO-3 wants it."""
    gc.collect()
    unset_hf_deepspeed_config()
