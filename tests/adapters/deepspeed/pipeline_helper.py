"""Steps of a DeepSpeed pipeline of two stages against one process on the same micro-batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import nn

from regate_ds.adapters.deepspeed.pipeline import PipelineRegate, attach_pipeline
from regate_ds.adapters.deepspeed.pipeline_student import pipeline_student
from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.algorithm.batch import host_labels
from regate_ds.algorithm.plan import StepPlan
from regate_ds.config import RegateConfig
from regate_ds.data.collate import Batch
from regate_ds.job.process import start_process
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.adapters.deepspeed.zero_cases_helper import (
    BY_WINDOW,
    IMAGES_ALONE,
    IMAGES_ELIDED,
    MERGED,
    ZeroCase,
)
from tests.adapters.deepspeed.zero_checks_helper import (
    NUM_STEPS,
    TOLERANCE,
    reference_of,
    run_named,
)
from tests.adapters.merging.merged_helper import merged_loss
from tests.support.measure import Gradients, assert_gradients_equal, gradients
from tests.support.oracle import oracle_loss
from tests.support.stores import read_difficulty

STAGES = 2
UNEVEN = (((24,), (17,)), ((9,), (21,)))


@dataclass(frozen=True)
class PipeCase:
    """A step of a case's micro-batches; with two data ranks, of both its ranks."""

    zero: ZeroCase
    checkpoint_interval: int = 0
    attention: str = "sdpa"

    def model(self) -> nn.Module:
        model = self.zero.model()
        model.set_attn_implementation(self.attention)
        return model


TEXT = ZeroCase("text", accumulation=3, rows=UNEVEN)
LLAVA = ZeroCase("llava", accumulation=3, rows=UNEVEN, knobs=IMAGES_ELIDED)
WEIGHTED = (("execution", "weighted"), ("keep_share", 1.0), ("score", "reference"))
SMALL = {
    "text": PipeCase(replace(TEXT, stage=0)),
    "text, all layers gated": PipeCase(replace(TEXT, stage=1, knobs=(("first_layer", 0),))),
    "text, gate at the border": PipeCase(replace(TEXT, knobs=(("first_layer", 2),)), 1, "eager"),
    "text, a dense step": PipeCase(replace(TEXT, knobs=(("warmup", 1),))),
    "text, recompute": PipeCase(replace(TEXT, stage=1), checkpoint_interval=1),
    "llava": PipeCase(replace(LLAVA, stage=1)),
    "text, loss only": PipeCase(replace(TEXT, knobs=(("execution", "loss_only"),))),
    "llava, images alone": PipeCase(replace(LLAVA, knobs=IMAGES_ALONE)),
    "text, weighted": PipeCase(replace(TEXT, stage=1, knobs=WEIGHTED)),
    "text, merged": PipeCase(replace(TEXT, stage=1, knobs=MERGED), checkpoint_interval=1),
    "llava, merged": PipeCase(replace(LLAVA, knobs=MERGED)),
    "text, by window": PipeCase(replace(TEXT, knobs=BY_WINDOW)),
    "llava, all layers gated": PipeCase(replace(LLAVA, knobs=(("first_layer", 0),)), 1),
}
LARGE = {
    "text on two data ranks": PipeCase(replace(TEXT, stage=1)),
    "llava on two data ranks": PipeCase(replace(LLAVA, stage=0)),
}


@dataclass
class Pipe:
    """A started pipeline, and the names that its parameters had in the model."""

    engine: Any
    regate: PipelineRegate
    names: dict[int, str]
    found: Gradients = field(default_factory=dict)


def start(case: PipeCase, config: RegateConfig | None = None) -> Pipe:
    zero, model = case.zero, case.model()
    names = {id(p): n for n, p in model.named_parameters()}
    student = pipeline_student(
        model,
        config or zero.config,
        num_stages=STAGES,
        # The head is large here: by parameters, the last stage would be the head alone.
        partition_method="uniform",
        activation_checkpoint_interval=case.checkpoint_interval,
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": zero.accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero.stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.05)
    engine = deepspeed.initialize(model=student, optimizer=optimizer, config=settings)[0]
    enabled = (config or zero.config).enabled
    reference = reference_of(zero) if enabled else None
    regate = attach_pipeline(engine, total_steps=NUM_STEPS, reference=reference)
    return Pipe(engine, regate, names)


def gradients_of_step(pipe: Pipe, batches: list[Any]) -> tuple[float, Gradients]:
    """Loss of one step, and what this stage's optimizer was given."""
    engine, take = pipe.engine, pipe.engine._take_model_step
    found: Gradients = {}

    def taken(*args: Any) -> None:
        for parameter in engine.module.parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                found[pipe.names[id(parameter)]] = gradient.clone()
        take(*args)

    engine._take_model_step = taken
    loss = pipe.regate.train_batch(iter(batches))
    engine._take_model_step = take
    pipe.regate.step(applied=True)
    return float(loss), found


def data_rank() -> int:
    return dist.get_rank() % (dist.get_world_size() // STAGES)


def joint_plan(case: PipeCase, batches: list[Batch]) -> StepPlan:
    store = reference_of(case.zero)
    difficulty = DifficultyStore(store.index)
    session = Regate(case.zero.config, Stores(store, difficulty), total_steps=NUM_STEPS)
    return session.plan_step([batch.tokens for batch in batches])


def wanted(case: PipeCase) -> tuple[float, Gradients]:
    """The same step in one process: text by the plain oracle, images by the gated model."""
    config, model = case.zero.config, case.model()
    ranks = range(dist.get_world_size() // STAGES)
    batches = [batch for rank in ranks for batch in case.zero.batches(rank)]
    step = joint_plan(case, batches)
    if case.zero.family == "text":
        depth = len(model.get_decoder().layers)
        gated = range(config.first_layer, depth)

        def loss_of(batch: Batch, plan: Any) -> torch.Tensor:
            embedded = model.get_input_embeddings()(batch.inputs["input_ids"])
            if plan.patches is not None:
                return merged_loss(model, embedded, batch.tokens, config.merge.size)
            return oracle_loss(model, embedded, batch.tokens, plan, gated)
    else:
        attach_model(model, config)

        def loss_of(batch: Batch, plan: Any) -> torch.Tensor:
            return model(**batch.inputs, regate_plan=plan).loss_sum

    total = 0.0
    for batch, plan in zip(batches, step.micro, strict=True):
        loss = loss_of(batch, plan) / step.num_targets_global
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def check_step(case: PipeCase) -> None:
    pipe = start(case)
    loss, found = gradients_of_step(pipe, case.zero.batches(data_rank()))
    wanted_loss, expected = wanted(case)
    assert abs(loss - wanted_loss) <= 1e-6 * abs(wanted_loss) + 1e-6, (loss, wanted_loss)
    mine = {n: expected[n] for n in pipe.names.values() if n in found and n in expected}
    assert mine, "this stage has no parameter"
    assert_gradients_equal({n: found[n] for n in mine}, mine, TOLERANCE)
    counts = pipe.regate.metrics()
    assert (counts["image_kept"] < counts["image_total"]) == case.zero.config.chooses_images
    pipe.engine.destroy()


def check_disabled() -> None:
    """Without elision the loss is the host's own mean, and no session is opened."""
    case = SMALL["text"]
    batches = [
        {"input_ids": b.inputs["input_ids"], "labels": host_labels(b.tokens.labels_BT)}
        for b in case.zero.batches(0)
    ]
    pipe = start(case, RegateConfig(enabled=False))
    loss, found = gradients_of_step(pipe, batches)
    host = case.model()
    total = sum(host(**batch).loss for batch in batches) / len(batches)
    total.backward()
    assert abs(loss - float(total.detach())) <= 1e-6 * float(total.detach())
    expected = gradients(host)
    assert_gradients_equal(found, {n: expected[n] for n in found}, TOLERANCE)
    pipe.engine.destroy()
    # What ReGATE's own collate functions make is the host's batch too.
    again = start(case, RegateConfig(enabled=False))
    assert gradients_of_step(again, case.zero.batches(0))[0] == pytest.approx(loss, rel=1e-6)
    again.engine.destroy()


def remembered(pipe: Pipe, keys: list[Any]) -> torch.Tensor:
    return read_difficulty(pipe.regate._opened.difficulty, keys)


def check_memory() -> None:
    """Difficulty is learnt where the losses are, survives a restart, and evaluation leaves it."""
    case = SMALL["text"]
    pipe = start(case)
    batches = case.zero.batches(0)
    with pytest.raises(RuntimeError, match="call train_batch first"):
        pipe.regate.step(applied=True)
    pipe.regate.train_batch(iter(batches))
    # An evaluation before the step is ended does not change what the step is remembered by.
    losses = dict(pipe.regate._losses)
    pipe.regate.eval_batch(iter(batches[::-1]))
    assert all(pipe.regate._losses[number] is losses[number] for number in losses)
    pipe.regate.step(applied=True)
    keys = [key for batch in batches for key in batch.tokens.flat_keys]
    learnt = remembered(pipe, keys) if pipe.engine.is_last_stage() else None
    pipe.regate.eval_batch(iter(batches))
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    pipe.regate.save(folder)
    dist.barrier()
    other = start(case)
    other.regate.load(folder)
    if pipe.engine.is_last_stage():
        mine, theirs = (remembered(p, keys) for p in (pipe, other))
        assert torch.equal(mine, learnt)
        assert torch.equal(mine, theirs)
        assert bool((mine > 0).any())
    assert other.regate.plan is None
    # Every stage has the plan, and with it the step's counts.
    assert pipe.regate.metrics()["step"] == 0
    assert pipe.regate.metrics()["answer_kept"] == pipe.regate.plan.num_targets_global > 0


def check_evaluation() -> None:
    """The dense model's mean over all targets, whatever the schedule says."""
    case = SMALL["llava"]
    batches = case.zero.batches(0)
    found = float(start(case).regate.eval_batch(iter(batches)))
    model, total, count = case.model().eval(), 0.0, 0
    for batch in batches:
        labels = batch.tokens.labels_BT
        with torch.no_grad():
            logits = model(**batch.inputs).logits
        total += float(nn.functional.cross_entropy(logits.mT, labels, reduction="sum"))
        count += int((labels >= 0).sum())
    assert abs(found - total / count) <= 1e-5 * found


def check_refusals() -> None:
    case = SMALL["text"]
    with pytest.raises(ValueError, match="last_layer=2 ends before the depth"):
        pipeline_student(case.model(), RegateConfig(last_layer=2), num_stages=STAGES)
    tied = ZeroCase("tied text").model()
    with pytest.raises(ValueError, match="ties its input and output embeddings"):
        pipeline_student(tied, case.zero.config, num_stages=STAGES)
    eyes = ZeroCase("qwen2_vl").model()
    with pytest.raises(ValueError, match="rotary positions of several axes"):
        pipeline_student(eyes, case.zero.config, num_stages=STAGES)
    with pytest.raises(AssertionError, match="ZeRO-2 and ZeRO-3 are incompatible"):
        start(replace(case, zero=replace(case.zero, stage=2)))


def check_short_data() -> None:
    """Data that ends within a step is an error on every stage, and nobody waits."""
    pipe = start(SMALL["text"])
    batches = SMALL["text"].zero.batches(0)
    kind = ValueError if pipe.engine.is_last_stage() else RuntimeError
    with pytest.raises(kind, match="ended after 2 of the step's 3|has failed"):
        pipe.regate.train_batch(iter(batches[:2]))
    loss, _ = gradients_of_step(pipe, batches)
    assert loss > 0


def check_diverged() -> None:
    """A loss that is not finite ends the step with an error on every stage."""
    pipe = start(SMALL["text"])
    train = pipe.engine.train_batch

    def diverging(feed: Any) -> Any:
        loss = train(feed)
        for losses_L in pipe.engine.module.losses.values():
            losses_L.fill_(torch.nan)
        return loss

    pipe.engine.train_batch = diverging
    match = "has diverged" if pipe.engine.is_last_stage() else "has failed"
    pipe.regate.train_batch(iter(SMALL["text"].zero.batches(0)))
    with pytest.raises(RuntimeError, match=match):
        pipe.regate.step(applied=True)


def named_checks(cases: dict[str, PipeCase]) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, case in cases.items():
        yield name, partial(check_step, case)


def check_entropy() -> None:
    """The last stage remembers the entropies of the host's own logits, in a dense step."""
    case = PipeCase(replace(TEXT, knobs=(("score", "entropy"), ("warmup", 1))))
    pipe, batches = start(case), case.zero.batches(0)
    pipe.regate.train_batch(iter(batches))
    pipe.regate.step(applied=True)
    if pipe.engine.is_last_stage():
        host, store = case.model(), pipe.regate._opened.difficulty
        for batch in batches:
            logits = host(**batch.inputs).logits[batch.tokens.is_label_BT]
            wanted = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
            found = store.read(batch.tokens.flat_keys)["entropy"]
            assert torch.allclose(found, wanted, rtol=1e-5)
    # Evaluation takes none, and a sparse step is remembered too.
    pipe.regate.eval_batch(iter(batches))
    pipe.regate.train_batch(iter(batches))
    pipe.regate.step(applied=True)
    pipe.engine.destroy()


OTHERS: dict[str, Callable[[], None]] = {
    "entropy": check_entropy,
    "disabled": check_disabled,
    "memory": check_memory,
    "evaluation": check_evaluation,
    "refusals": check_refusals,
    "short data": check_short_data,
    "diverged": check_diverged,
}


def check_pipelines(rank: int, folder: str) -> None:
    start_process()
    run_named(rank, folder, {**dict(named_checks(SMALL)), **OTHERS})


def check_data_parallel_pipelines(rank: int, folder: str) -> None:
    start_process()
    run_named(rank, folder, dict(named_checks(LARGE)))
