"""Checks of the recipe on two data ranks; each runs in every rank's process."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from regate_ds.algorithm.batch import host_labels
from regate_ds.job.preemption import Preempted
from regate_ds.job.process import start_process
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.preflight import judge_run
from regate_ds.recipe.trainer import Trainer
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.precompute import TeacherJob, precompute
from regate_ds.teacher.scoring import score_samples

STEPS = 12


class Killed(Exception):
    pass


class KilledTrainer(Trainer):
    """Stops after step 7, as a lost machine would: nothing is written."""

    def _after(self, done: int) -> None:
        super()._after(done)
        if done == 7:
            raise Killed


def config_of(folder: Path, out: str, *overrides: str):
    return load_config(folder / "run.yaml", [f"run.out={folder / out}", *overrides])


def run(folder: Path, out: str, *overrides: str, trainer: type[Trainer] = Trainer) -> Trainer:
    config = config_of(folder, out, *overrides)
    judge_run(config)
    process = start_process()
    made = trainer(config, load_corpus(config), process)
    made.run()
    return made


def weights(folder: Path, out: str) -> dict[str, torch.Tensor]:
    return load_file(folder / out / "model" / "model.safetensors")


def rows(folder: Path, out: str) -> list[dict[str, Any]]:
    """Metrics without the times."""
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    timed = {"step_seconds", "cpu_seconds", "teacher_seconds"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def difficulty(folder: Path, out: str) -> list[np.ndarray]:
    last = folder / out / "checkpoints" / f"step-{STEPS:06d}" / "regate"
    return [np.load(path)["column.difficulty"] for path in sorted(last.glob("difficulty-*.npz"))]


def assert_same_run(folder: Path, one: str, other: str) -> None:
    assert rows(folder, one) == rows(folder, other)
    for name, weight in weights(folder, one).items():
        assert torch.equal(weight, weights(folder, other)[name]), name
    values = difficulty(folder, one)
    assert len(values) == dist.get_world_size()
    assert any(v.any() for v in values)
    for mine, theirs in zip(values, difficulty(folder, other), strict=True):
        assert np.array_equal(mine, theirs)


def check_recipe(rank: int, folder: str) -> None:
    """All checks of one world size, one after the other in the same processes."""
    root = Path(folder)
    run(root, "whole")
    check_counts_follow_the_plan(root)
    run(root, "again")
    assert_same_run(root, "whole", "again")
    check_resume_equals_never_stopped(root)
    check_a_run_that_is_asked_to_end_resumes(root)
    check_disabled_is_the_plain_loop(root)
    check_other_length_is_refused(root)
    check_a_balanced_run_is_the_run(root)
    check_a_failed_evaluation_loses_nothing(root)
    check_what_is_not_finite_ends_the_run(root)


def check_a_balanced_run_is_the_run(root: Path) -> None:
    """Other ranks read the samples of a step; losses and counts are those of the step all the same,
    but for the order of sums and the padding."""
    made = run(root, "balanced", "run.balance=true")
    balanced, plain = ([*replace(made.order, costs=costs)] for costs in (made.order.costs, None))
    assert sorted(sum(balanced, [])) != sorted(sum(plain, []))
    for mine, whole in zip(rows(root, "balanced"), rows(root, "whole"), strict=True):
        for key in mine.keys() - {"padded", "flops"}:
            rounded = key in ("loss", "grad_norm")
            assert mine[key] == (pytest.approx(whole[key], rel=1e-4) if rounded else whole[key])


class Unevaluated(Trainer):
    """Whose evaluation at the end of the run fails."""

    def _evaluate(self, done: int) -> dict[str, Any]:
        if done == STEPS:
            raise Killed
        return super()._evaluate(done)


class Diverging(Trainer):
    """Whose weights break before the third step."""

    def _after(self, done: int) -> None:
        super()._after(done)
        if done == 2:
            for parameter in self.engine.model.parameters():
                parameter.data.fill_(float("nan"))


class Exploding(Trainer):
    """Whose gradients break in the third step, while the loss is fine."""

    def _after(self, done: int) -> None:
        super()._after(done)
        if done == 2:
            for parameter in self.engine.model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: gradient * float("inf"))


def check_a_failed_evaluation_loses_nothing(root: Path) -> None:
    """The model and the last checkpoint are there, and a resume has only to evaluate."""
    with pytest.raises(Killed):
        run(root, "failed", "run.eval_every=6", trainer=Unevaluated)
    assert_same_run(root, "whole", "failed")
    run(root, "failed", "run.eval_every=6", "run.resume=true")
    run(root, "failed", "run.eval_every=6", "run.resume=true")
    lines = (root / "failed" / "evals.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 6, STEPS]
    summary = json.loads((root / "failed" / "summary.json").read_text())
    store = ReferenceStore(root / "store")
    assert summary["teacher_id"] == store.teacher_id
    assert summary["data_fingerprint"] == store.fingerprint


def check_what_is_not_finite_ends_the_run(root: Path) -> None:
    for name, trainer, told in (
        ("diverged", Diverging, "step 2: the loss is nan, in a micro-batch of mine record"),
        ("exploded", Exploding, "step 2: the gradient's norm is not finite, in a step of mine rec"),
    ):
        with pytest.raises(RuntimeError, match=told) as end:
            run(root, name, trainer=trainer)
        # The samples of all ranks: two ranks with two micro-batches of two.
        assert str(end.value).count("mine record") == 4 * dist.get_world_size()
        assert [row["step"] for row in rows(root, name)] == [0, 1]


def check_counts_follow_the_plan(root: Path) -> None:
    """Kept targets are the sum of k = ceil(n / 2) over the samples of sparse steps."""
    config = config_of(root, "whole")
    corpus = load_corpus(config)
    trainer = Trainer(config, corpus, start_process())
    world = dist.get_world_size()
    for row in rows(root, "whole"):
        step = replace(trainer.order, start_step=row["step"], total_steps=row["step"] + 1)
        numbers = [n for r in range(world) for micro in replace(step, rank=r) for n in micro]
        counts = [int((corpus.train.encode(n).labels_S >= 0).sum()) for n in numbers]
        expected = sum(counts) if row["dense"] else sum(-(-n // 2) for n in counts)
        assert row["answer_total"] == sum(counts)
        assert row["answer_kept"] == expected + row["filled"]
        # Every sample has one image of 16 tokens.
        assert row["image_total"] == 16 * len(counts)
        assert row["image_kept"] == (16 if row["dense"] else 8) * len(counts)
    dense = [row["dense"] for row in rows(root, "whole")]
    assert dense == [s < 2 or s >= 10 for s in range(STEPS)]
    check_share_is_the_schedules(root, trainer)


def check_share_is_the_schedules(root: Path, trainer: Trainer) -> None:
    """The mean over steps is the expected share, but for k being rounded up in each sample."""
    elision = trainer.config.elision
    share = elision.schedules(STEPS).answers.expected_share()
    found, rounding = 0.0, 0.0
    for row in rows(root, "whole"):
        found += (row["answer_kept"] - row["filled"]) / row["answer_total"] / STEPS
        rounding += trainer.order.samples_per_step / row["answer_total"] / STEPS
    assert share <= found < share + rounding


def check_resume_equals_never_stopped(root: Path) -> None:
    with pytest.raises(Killed):
        run(root, "resumed", trainer=KilledTrainer)
    run(root, "resumed", "run.resume=true")
    assert_same_run(root, "whole", "resumed")


class Asked(Trainer):
    """Whose last rank alone is told, after step 4, that its machine is wanted back."""

    def _after(self, done: int) -> None:
        super()._after(done)
        if done == 4 and self.process.rank == self.process.world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def check_a_run_that_is_asked_to_end_resumes(root: Path) -> None:
    """All ranks stop after the same step, and resuming equals never having stopped."""
    with pytest.raises(Preempted) as end:
        run(root, "asked", "run.resume=auto", trainer=Asked)
    assert ("after 5 of 12 steps" in str(end.value)) == (dist.get_rank() == 0)
    run(root, "asked", "run.resume=auto")
    assert_same_run(root, "whole", "asked")


def check_half_under_zero_3(rank: int, folder: str) -> None:
    """Ends in the middle; it is gone on with on another number of ranks."""
    with pytest.raises(Killed):
        run(Path(folder), "half", STAGE_3, trainer=KilledTrainer)


def check_resume_on_one_rank(rank: int, folder: str) -> None:
    """It is the run of two ranks, but for sums in another order."""
    root = Path(folder)
    with pytest.raises(ValueError, match="of 8 samples a step, but .* is 4 here; set run.accum"):
        run(root, "half", STAGE_3, "run.resume=true")
    run(root, "half", STAGE_3, "run.accumulation=4", "run.resume=true")
    for mine, whole in zip(rows(root, "half"), rows(root, "whole"), strict=True):
        loss, norm = (pytest.approx(whole[key], rel=1e-5) for key in ("loss", "grad_norm"))
        assert mine == {**whole, "loss": loss, "grad_norm": norm}
    saved = root / "half" / "checkpoints"
    left = {path.name for path in saved.rglob("*")}
    assert not left & {"universal", "latest_universal"}


STAGE_3 = "run.deepspeed={zero_optimization: {stage: 3}}"

ONLINE = ["teacher.mode=online", "teacher.store=null", "teacher.tokens_per_batch=1"]
"""Each sample is scored by itself, so that sums are the store's to the last digit."""


def check_online_is_the_store_without_a_store(root: Path) -> None:
    """Step for step, also after a stop; only sparse steps have a cost, which is told."""
    config, process = config_of(root, "online"), start_process()
    corpus = load_corpus(config)
    teacher = text_backbone(corpus.student.model)
    pad_id = corpus.student.tokenizer.pad_token_id
    job = TeacherJob(
        index=corpus.index,
        encode=corpus.train.encode,
        score=partial(score_samples, teacher, pad_id=pad_id),
        teacher_id="one by one",
        store=root / f"store-{process.world_size}",
        tokens_per_batch=1,
    )
    precompute(job, process.group)
    by_store, online = (f"{x}-{process.world_size}" for x in ("stored", "online"))
    run(root, by_store, f"teacher.store={job.store}")
    run(root, online, *ONLINE)
    assert_same_run(root, by_store, online)
    if process.world_size > 1:
        check_online_resumes(root, online)
    lines = (root / online / "metrics.jsonl").read_text().splitlines()
    costs = [json.loads(line)["teacher_seconds"] for line in lines]
    assert [cost > 0 for cost in costs] == [not row["dense"] for row in rows(root, online)]
    summary = json.loads((root / online / "summary.json").read_text())
    assert summary["teacher_seconds"] == pytest.approx(sum(costs))


def check_online_resumes(root: Path, online: str) -> None:
    resumed = f"{online}-resumed"
    with pytest.raises(Killed):
        run(root, resumed, *ONLINE, trainer=KilledTrainer)
    run(root, resumed, *ONLINE, "run.resume=true")
    assert_same_run(root, online, resumed)


def check_a_sharded_teacher_inside_the_job(root: Path) -> None:
    """Ranks with samples of their own score them together; the student trains as before."""
    for sharding in ({"sharding": "tensor", "tensor": 2}, {"sharding": "zero3"}):
        out = f"online-{sharding['sharding']}"
        run(root, out, *ONLINE, *(f"teacher.{key}={value}" for key, value in sharding.items()))
        for mine, whole in zip(rows(root, out), rows(root, "online-2"), strict=True):
            # Sums over two ranks' parts differ in the last digit: too little to change a plan.
            assert mine == {**whole, "loss": pytest.approx(whole["loss"], rel=1e-5)}


def check_online(rank: int, folder: str) -> None:
    """The teacher inside the job, on any number of ranks."""
    check_online_is_the_store_without_a_store(Path(folder))
    if dist.get_world_size() > 1:
        check_a_sharded_teacher_inside_the_job(Path(folder))


def check_other_length_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="run.steps=20, but .*whole was started with 12"):
        run(root, "whole", "run.resume=true", "run.steps=20")


def check_disabled_is_the_plain_loop(root: Path) -> None:
    """elision.enabled=false: the weights of a loop that has never heard of us, bit for bit."""
    import deepspeed

    norms = []
    for stage in (0, 2, 3):
        zero = f"run.deepspeed={{zero_optimization: {{stage: {stage}}}}}"
        out = f"off-{stage}"
        config = config_of(root, out, zero, "elision.enabled=false", "run.steps=5")
        ours = run(root, out, zero, "elision.enabled=false", "run.steps=5").engine.model
        corpus = load_corpus(config)
        model = corpus.student.model.train()
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.0},
                {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=(0.9, 0.999),
            eps=1e-8,
        )
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
        }
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        order = Trainer(config, load_corpus(config), start_process()).order
        losses = []
        for numbers in order:
            batch = corpus.collator([corpus.train[n] for n in numbers])
            labels = host_labels(batch.tokens.labels_BT)
            loss = engine(**batch.inputs, labels=labels).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        per_step = (torch.stack(losses).view(5, 2).sum(dim=1) / 2).double()
        dist.all_reduce(per_step)
        norms.append([row["grad_norm"] for row in rows(root, out)])
        found = [row["loss"] for row in rows(root, out)]
        assert found == [float(x) / dist.get_world_size() for x in per_step], stage
        pairs = zip(ours.named_parameters(), model.parameters(), strict=True)
        for (name, mine), theirs in pairs:
            with deepspeed.zero.GatheredParameters([mine, theirs], enabled=stage == 3):
                assert torch.equal(mine, theirs), (stage, name)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
