"""transformers.Trainer without DeepSpeed: steps and short runs, on one rank or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from regate_ds import Keyed, RegateConfig
from regate_ds.adapters.trainers.hf_trainer import RegateTrainer
from tests.adapters.deepspeed.zero_cases_helper import IMAGES_ELIDED, RANKS, ZeroCase
from tests.adapters.deepspeed.zero_checks_helper import TOLERANCE, joint_gradients, reference_of
from tests.adapters.torch.loops_helper import UNREACHED, whole
from tests.adapters.torch.runs_helper import Items, collate, reference
from tests.adapters.trainers.trl_helper import Watching, check_ranks
from tests.support.measure import Gradients, assert_gradients_equal
from tests.support.models import causal_lm
from tests.support.planning import config_of
from tests.support.stores import read_difficulty

NUM_ITEMS, ACCUMULATION = 10, 2
"""Of two ranks each has five micro-batches an epoch: its third step has one."""

STEPS, SAVED_AFTER = 4, 2


def settings(folder: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": [],
    }
    return TrainingArguments(**{**options, **more})


class OnFsdp2:
    """accelerate 1.15 gives FSDP to GPUs only; what Trainer does then can be done on the CPU."""

    version, layers = 2, ("LlamaDecoderLayer",)

    def create_accelerator_and_postprocess(self: Any) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=self.version,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=self.layers,
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True


class Given(RegateTrainer):
    """Trains on micro-batches that are made already."""

    def get_train_dataloader(self: Any) -> Any:
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=itemgetter(0))


class GivenOnFsdp2(OnFsdp2, Given):
    layers = ("LlamaDecoderLayer", "CLIPEncoderLayer")


class OnFsdp1(OnFsdp2, RegateTrainer):
    version = 1


class WatchingOnFsdp2(OnFsdp2, Watching):
    layers = ("LlamaDecoderLayer", "CLIPEncoderLayer")


class PlainOnFsdp2(OnFsdp2, Trainer):
    pass


class RegateOnFsdp2(OnFsdp2, RegateTrainer):
    pass


WRAPPED = {Given: "DistributedDataParallel", GivenOnFsdp2: "FSDP"}
"""How the type's name begins that two ranks train."""


class Gradient(TrainerCallback):
    """What the optimizer is given."""

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **_: Any) -> None:
        named = {name: p.grad for name, p in model.named_parameters()}
        self.found = {name: whole(grad) for name, grad in named.items() if grad is not None}


def gradient(kind: type, case: ZeroCase, ranks: tuple[int, ...], folder: Path) -> Gradients:
    """One step of Trainer on the micro-batches of these ranks."""
    batches = [batch for rank in ranks for batch in case.batches(rank)]
    kept = Gradient()
    trainer = kind(
        model=case.model(),
        args=settings(
            folder, max_steps=1, gradient_accumulation_steps=len(batches), max_grad_norm=0.0
        ),
        train_dataset=batches,
        callbacks=[kept],
        regate=case.config,
        reference=reference_of(case),
    )
    trainer.train()
    assert type(trainer.model_wrapped).__name__.startswith(
        WRAPPED[kind] if len(ranks) == 1 else "Llava"
    )
    return kept.found


def check_gradient(found: Gradients, case: ZeroCase) -> None:
    wanted = joint_gradients(case)[0]
    # DDP that finds unused weights gives them a gradient of 0.
    idle = [name for name in found if any(part in name for part in UNREACHED)]
    assert not any(bool(found[name].any()) for name in idle)
    mine, theirs = (
        {name: grad for name, grad in grads.items() if name not in idle}
        for grads in (found, wanted)
    )
    assert_gradients_equal(mine, theirs, TOLERANCE)


CASES = {
    f"accumulation {case.accumulation}": case
    for case in (ZeroCase(), ZeroCase(accumulation=4, knobs=IMAGES_ELIDED))
}


def check_gradient_of_ranks(rank: int, folder: Path, kind: type, case: ZeroCase) -> None:
    check_gradient(gradient(kind, case, (rank,), folder), case)


def check_gradient_of_one(case: ZeroCase, folder: Path) -> None:
    check_gradient(gradient(Given, case, RANKS, folder), case)


class Ran:
    """A run, and what it leaves behind."""

    def __init__(
        self,
        kind: type,
        folder: Path,
        *,
        saves: bool = False,
        resume: Path | None = None,
        **more: Any,
    ) -> None:
        self.trainer = kind(
            model=causal_lm(),
            args=settings(
                folder,
                max_steps=STEPS,
                gradient_accumulation_steps=ACCUMULATION,
                save_strategy="steps" if saves else "no",
                save_steps=SAVED_AFTER,
                remove_unused_columns=False,
            ),
            train_dataset=Keyed(Items(NUM_ITEMS), "mine") if more else Items(NUM_ITEMS),
            data_collator=collate,
            **more,
        )
        self.trainer.train(resume_from_checkpoint=resume and str(resume))
        history = self.trainer.state.log_history
        self.losses = [row["loss"] for row in history if "loss" in row]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: whole(p) for name, p in self.trainer.model.named_parameters()}

    @property
    def difficulty(self) -> Tensor:
        store = self.trainer.regate._opened.difficulty
        return read_difficulty(store, store.index.keys)


def assert_same_run(found: Ran, wanted: Ran) -> None:
    assert found.losses == wanted.losses
    assert len(wanted.losses) == STEPS
    weights = found.weights
    for name, weight in wanted.weights.items():
        assert torch.equal(weights[name], weight), name


def check_disabled(rank: int, folder: Path, plain: type, kind: type) -> None:
    off = {"regate": RegateConfig(enabled=False)}
    assert_same_run(Ran(kind, folder / "off", **off), Ran(plain, folder / "plain"))


def check_resumed(rank: int, folder: Path, kind: type) -> None:
    regate = config_of(warmup=1, final_dense_share=0.0)
    given = {"regate": regate, "reference": reference()}
    run = Ran(kind, folder, saves=True, **given)
    checkpoint = folder / f"checkpoint-{SAVED_AFTER}"
    resumed = Ran(kind, folder, resume=checkpoint, **given)
    assert_same_run(resumed, run)
    assert resumed.trainer.regate.metrics() == run.trainer.regate.metrics()
    assert not run.trainer.regate.metrics()["dense"]
    assert bool(run.difficulty.any())
    assert torch.equal(resumed.difficulty, run.difficulty)


RUNS: dict[str, Callable[[int, Path], None]] = {
    "off": partial(check_disabled, plain=Trainer, kind=RegateTrainer),
    "resumed": partial(check_resumed, kind=RegateTrainer),
}
"""In one process, or under DDP."""


class Sharded(LlamaForCausalLM):
    """As ``from_pretrained(distributed_config=...)`` leaves it, by what it says of itself."""

    is_distributed_loading_by_transformers = True


def refused(
    folder: Path,
    kind: type = RegateTrainer,
    *,
    n_gpu: int = 0,
    model: nn.Module | None = None,
    **options: Any,
) -> str:
    """Why such a Trainer cannot be made."""
    args = settings(folder, **options)
    args._n_gpu = n_gpu
    with pytest.raises(ValueError, match="not supported with") as caught:
        kind(
            model=model or causal_lm(),
            args=args,
            train_dataset=Items(),
            regate=config_of(),
            reference=reference(),
        )
    return str(caught.value)


def check_refused(rank: int, folder: Path) -> None:
    reason = refused(folder, average_tokens_across_devices=False)
    assert "average_tokens_across_devices=False" in reason


def of_ranks() -> Iterator[tuple[str, Callable[[int, Path], None]]]:
    for what, case in CASES.items():
        for name, kind in (("DDP", Given), ("FSDP2", GivenOnFsdp2)):
            yield f"{name}, {what}", partial(check_gradient_of_ranks, kind=kind, case=case)
    for what, run in RUNS.items():
        yield f"DDP, {what}", run
    yield "a setting that is refused", check_refused
    for name, trl in (("DistributedDataParallel", Watching), ("FSDP", WatchingOnFsdp2)):
        yield f"TRL's SFTTrainer, {name}", partial(check_ranks, kind=trl, wrapped=name)
    yield "FSDP2, off", partial(check_disabled, plain=PlainOnFsdp2, kind=RegateOnFsdp2)
    yield "FSDP2, resumed", partial(check_resumed, kind=RegateOnFsdp2)


OF_RANKS = dict(of_ranks())
