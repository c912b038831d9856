"""transformers.Trainer with ReGATE, and the examples of launch/, on two data ranks."""

from __future__ import annotations

import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from regate_ds import ImagesConfig, Keyed, ReferenceStore, RegateConfig, ScheduleConfig, attach
from regate_ds.adapters.trainers.hf_trainer import RegateMixin, RegateTrainer
from regate_ds.algorithm.executions.none import NoElision
from regate_ds.algorithm.scores.entropy import Entropy
from regate_ds.cost.sampler import BalancedSampler
from tests.support.paths import ROOT

EXAMPLES = ROOT / "launch" / "examples"
# Clipped to 1, as DeepSpeed does by itself, a gradient would not show by what it was scaled.
PLAIN = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0}
ZERO_2 = {**PLAIN, "zero_optimization": {"stage": 2}}
STEPS = 3
NUM_TRAIN = 16
"""Samples: each of two ranks has four micro-batches an epoch."""


def check_trainer(rank: int, folder: str) -> None:
    """All checks, one after the other in the same processes."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its loader starts two workers a rank and epoch; here they took minutes to end.
    io = deepspeed.DeepSpeedEngine.deepspeed_io
    deepspeed.DeepSpeedEngine.deepspeed_io = partialmethod(io, num_local_io_workers=0)
    sys.path.insert(0, str(EXAMPLES))
    root = Path(folder)
    check_the_loop_example(root)
    first = check_the_trainer_example(root)
    check_a_resumed_run_is_the_run(root, first)
    check_the_gradients_are_those_of_a_loop_of_your_own(root)
    check_disabled_is_trainers_own_run(root)
    check_a_balanced_run_has_the_same_steps(root)
    check_what_cannot_work_is_refused(root)
    # Last: after a pipeline, DeepSpeed takes every engine of the process for one.
    check_the_pipeline_example(root)


def arguments(root: Path, out: str) -> list[str]:
    return [str(root / "student"), str(root / "data" / "train.json"), str(root / out)]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def check_the_loop_example(root: Path) -> None:
    import deepspeed_loop

    losses = deepspeed_loop.main(arguments(root, "loop"))
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    dist.barrier()
    assert (root / "loop" / "last" / "regate" / "state.json").is_file()
    dense = deepspeed_loop.main([*arguments(root, "loop-dense"), "--dense"])
    assert dense[-1] < dense[0]


def check_the_pipeline_example(root: Path) -> None:
    import deepspeed_pipeline

    losses = deepspeed_pipeline.main(arguments(root, "pipeline"))
    assert losses[-1] < losses[0]
    dist.barrier()
    assert (root / "pipeline" / "last" / "regate" / "state.json").is_file()


def check_the_trainer_example(root: Path) -> Any:
    import hf_trainer

    trainer = hf_trainer.main(arguments(root, "trainer"))
    kept = trainer.regate.metrics()
    assert kept["step"] == hf_trainer.STEPS - 1
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == hf_trainer.STEPS
    # Without a plan the model is its own again, also while it is attached.
    assert trainer.evaluate()["eval_loss"] < 7
    return trainer


def check_a_resumed_run_is_the_run(root: Path, first: Any) -> None:
    import hf_trainer

    last = root / "trainer" / f"checkpoint-{hf_trainer.STEPS}"
    before = difficulty(last)
    # All have read it before it moves, and all have written theirs before it is read.
    dist.barrier()
    if dist.get_rank() == 0:
        last.rename(root / "trainer" / "whole")
    dist.barrier()
    again = hf_trainer.main([*arguments(root, "trainer"), "--resume"])
    assert again.state.global_step == hf_trainer.STEPS
    dist.barrier()
    for name, weight in weights(first.model).items():
        assert torch.equal(weight, weights(again.model)[name]), name
    for mine, theirs in zip(before, difficulty(last), strict=True):
        assert mine.any()
        assert np.array_equal(mine, theirs)


def difficulty(checkpoint: Path) -> list[np.ndarray]:
    files = sorted((checkpoint / "regate").glob("difficulty-*.npz"))
    return [np.load(path)["column.difficulty"] for path in files]


class Recorded(RegateTrainer):
    """Keeps the micro-batches as they come from the loader."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        seen = [next(epoch_iterator) for _ in range(num_batches)]
        self.windows = [*getattr(self, "windows", []), seen]
        return super().get_batch_samples(iter(seen), num_batches, device)


def parts(root: Path) -> tuple[Any, Any, Any]:
    from questions import Questions

    model = LlavaForConditionalGeneration.from_pretrained(root / "student")
    questions = Questions(root / "data" / "train.json", root / "student", 16)
    return model, Keyed(questions, "mine"), questions.collate()


def settings(root: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(root / "unused"),
        "deepspeed": {**ZERO_2, "gradient_accumulation_steps": "auto"},
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        # Three micro-batches do not divide the epoch's four: its last step has one.
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
    }
    return TrainingArguments(**{**options, **more})


def check_the_gradients_are_those_of_a_loop_of_your_own(root: Path) -> None:
    """Plain SGD, so that the weights after some steps are a sum of gradients."""
    schedule = ScheduleConfig(warmup=1, final_dense_share=0.0)
    # A step whose entropies were not recorded would not end.
    config = RegateConfig(score=Entropy(), schedule=schedule, images=ImagesConfig(keep_share=0.5))
    reference = ReferenceStore(root / "trainer" / "reference")
    model, data, collate = parts(root)
    trainer = Recorded(
        model=model,
        args=settings(root, optim="sgd", learning_rate=0.05),
        train_dataset=data,
        data_collator=collate,
        regate=config,
        reference=reference,
    )
    start = weights(model)
    trainer.train()
    assert [len(window) for window in trainer.windows] == [3, 1, 3]
    counts = trainer.regate.metrics()
    assert 0 < counts["image_kept"] < counts["image_total"]

    own = parts(root)[0]
    regate = attach(own.train(), config, total_steps=STEPS, reference=reference)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    # Without ZeRO, and with the boundary set by hand: the plainest loop with steps of any length.
    engine = deepspeed.initialize(model=own, optimizer=optimizer, config=PLAIN)[0]
    for micro in trainer.windows:
        window = regate.window(micro, engine)
        for number, batch in enumerate(window):
            engine.set_gradient_accumulation_boundary(number == len(window) - 1)
            engine.backward(regate.loss(engine(**batch)))
            engine.step()
        regate.step(applied=True)
    mine, theirs = weights(trainer.model), weights(own)
    moved = {name: (weight - start[name]).norm() for name, weight in theirs.items()}
    error = {name: (weight - mine[name]).norm() for name, weight in theirs.items()}
    # Seen: 3e-7 of all that moved. A single weight's share is up to 2e-5 where its steps are hardly
    # larger than what rounding it takes away; to a loop in double precision both have 6e-6.
    assert torch.stack([*error.values()]).norm() <= 1e-6 * torch.stack([*moved.values()]).norm()
    for name in theirs:
        assert error[name] <= 1e-5 * moved[name] + 1e-7, (name, error[name], moved[name])


def check_disabled_is_trainers_own_run(root: Path) -> None:
    ends = []
    disabled = {"regate": RegateConfig(enabled=False)}
    for kind, more in ((Trainer, {}), (RegateTrainer, disabled)):
        model, data, collate = parts(root)
        bare = data if more else data._dataset
        trainer = kind(
            model=model,
            args=settings(root, logging_steps=1, remove_unused_columns=False),
            train_dataset=bare,
            data_collator=collate,
            **more,
        )
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        ends.append((losses, weights(trainer.model)))
    (theirs, their_weights), (ours, our_weights) = ends
    assert ours == theirs
    assert len(ours) == STEPS
    for name, weight in their_weights.items():
        assert torch.equal(weight, our_weights[name]), name


class Balanced(Recorded):
    """Divides a step's samples by what they cost, if ``costs`` are given."""

    costs: list[float] | None = None

    def _get_train_sampler(self, *_: Any) -> Any:
        return BalancedSampler(
            self.costs or [1.0] * NUM_TRAIN, batch_size=8, world_size=2, micro_batches=2
        )


def check_a_balanced_run_has_the_same_steps(root: Path) -> None:
    """Each step has the same samples and so, to rounding, the same loss; ranks share them."""
    found = []
    for costs in (None, [1.0 + n**2 for n in range(NUM_TRAIN)]):
        model, data, collate = parts(root)
        trainer = Balanced(
            model=model,
            args=settings(root, gradient_accumulation_steps=2, max_steps=2, logging_steps=1),
            train_dataset=data,
            data_collator=collate,
            regate=RegateConfig(execution=NoElision()),
        )
        trainer.costs = costs
        trainer.train()
        keys = [[batch.tokens.flat_keys for batch in window] for window in trainer.windows]
        steps: list[Any] = [None, None]
        dist.all_gather_object(steps, keys)
        found.append((steps, [row["loss"] for row in trainer.state.log_history if "loss" in row]))
    (plain, losses), (balanced, own_losses) = found
    assert balanced != plain
    for step in range(2):
        ours, theirs = (
            sorted(key for rank in steps for micro in rank[step] for key in micro)
            for steps in (balanced, plain)
        )
        assert ours == theirs
        assert len(ours) == 8
    assert own_losses == pytest.approx(losses, rel=1e-4)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


class OwnLoss(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class OwnLossWithRegate(RegateMixin, OwnLoss):
    pass


def check_what_cannot_work_is_refused(root: Path) -> None:
    model, data, collate = parts(root)

    def make(kind: type = RegateTrainer, given: dict[str, Any] | None = None, **more: Any) -> Any:
        return kind(
            model=model,
            args=settings(root, **more),
            data_collator=collate,
            regate=RegateConfig(keep_share=1.0),
            **{"train_dataset": data, **(given or {})},
        )

    for message, build in (
        ("label_smoothing_factor=0.1", lambda: make(label_smoothing_factor=0.1)),
        ("group_by_length", lambda: make(train_sampling_strategy="group_by_length")),
        ("train_dataset=Stream", lambda: make(given={"train_dataset": Stream()})),
        ("compute_loss_func", lambda: make(given={"compute_loss_func": print})),
        ("a compute_loss of your own", lambda: make(OwnLossWithRegate)),
        ("use_liger_kernel=True", lambda: make(use_liger_kernel=True)),
        ("auto_find_batch_size=True", lambda: make(auto_find_batch_size=True)),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    longer = make(max_steps=9, output_dir=str(root / "longer"))
    with pytest.raises(ValueError, match="total_steps=9, but the checkpoint's run has 4"):
        longer.train(resume_from_checkpoint=str(root / "trainer" / "whole"))
