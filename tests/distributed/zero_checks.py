"""Gradients of two ranks with different work against one process on the joint batch."""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from regate_ds.adapters.deepspeed import attach
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.config import RegateConfig
from regate_ds.data.answer_index import AnswerIndex
from regate_ds.data.collate import Batch
from regate_ds.training.process import start_process
from tests.measure import assert_gradients_equal
from tests.models import IMAGE_TOKEN, llava, random_batch

ROWS = {0: [[24], [17]], 1: [[6]]}
"""Much on one rank; on the other a short sample without an image."""


class Sample:
    def __init__(self, key, labels_S):
        self.key, self.labels_S = key, labels_S
        self.is_placeholder_S = torch.zeros_like(labels_S, dtype=torch.bool)


class Reference:
    """Random losses for every label position of all ranks' samples."""

    def __init__(self, index: AnswerIndex) -> None:
        self.index = index
        self._values_N = torch.rand(index.num_tokens, generator=torch.Generator().manual_seed(3))

    def read(self, keys):
        return self._values_N[self.index.locate(keys)]


def micro_batch(rank: int, number: int) -> Batch:
    ids, tokens = random_batch(ROWS[rank], seed=10 * rank + number)
    name = f"rank{rank}-{number}"
    keys = tuple(((name, i),) for i in range(len(ids)))
    labels = tokens.labels_BT
    inputs = {"input_ids": ids}
    if rank == 0:
        ids[:, 1:5] = IMAGE_TOKEN
        labels = torch.where(ids.roll(-1, 1) == IMAGE_TOKEN, -100, labels)
        generator = torch.Generator().manual_seed(number)
        inputs["pixel_values"] = torch.randn(len(ids), 3, 16, 16, generator=generator)
    return Batch(inputs, TokenBatch(keys, tokens.segment_BT, labels))


def reference(accumulation: int) -> Reference:
    batches = [micro_batch(rank, n) for rank in ROWS for n in range(accumulation)]
    rows = [(k, b.tokens.labels_BT[i]) for b in batches for i, k in enumerate(b.tokens.flat_keys)]
    return Reference(AnswerIndex.build(Sample(key, labels) for key, labels in rows))


def knobs() -> RegateConfig:
    return RegateConfig(total_steps=4, warmup=0, final_dense_share=0.0)


def joint_gradients(accumulation: int) -> dict[str, torch.Tensor]:
    """The same step in one process: the sum over all micro-batches over the joint count."""
    from regate_ds.adapters.huggingface import attach_model
    from regate_ds.data.difficulty_store import DifficultyStore
    from regate_ds.session import Regate

    store = reference(accumulation)
    session = Regate(knobs(), reference=store, difficulty=DifficultyStore(store.index))
    batches = [micro_batch(rank, n) for rank in ROWS for n in range(accumulation)]
    step = session.plan_step([batch.tokens for batch in batches])
    model = llava()
    attach_model(model, first_layer=1, run_tower_without_image=True)
    for batch, plan in zip(batches, step.micro, strict=True):
        loss = model(**batch.inputs, regate_plan=plan).loss_sum / step.num_targets_global
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def engine_gradients(rank: int, stage: int, accumulation: int) -> dict[str, torch.Tensor]:
    model = llava()
    regate = attach(model, knobs(), reference=reference(accumulation))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    loader = [micro_batch(rank, n) for n in range(accumulation)]
    (window,) = regate.windows(loader, engine)
    for number, (inputs, plan) in enumerate(window, start=1):
        engine.backward(regate.loss(engine(**inputs, regate_plan=plan), plan))
        if number < accumulation:
            engine.step()
    found = {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
    engine.step()
    regate.step(applied=engine.was_step_applied())
    return {n: g.clone() for n, g in found.items() if g is not None}


def check_zero(rank: int) -> None:
    start_process()
    for accumulation in (1, 3):
        wanted = joint_gradients(accumulation)
        for stage in (1, 2, 3):
            found = engine_gradients(rank, stage, accumulation)
            missing = wanted.keys() - found.keys()
            assert not any(wanted[name].any() for name in missing), (stage, missing)
            shared = {n: g for n, g in wanted.items() if n in found}
            assert_gradients_equal({n: found[n] for n in shared}, shared, 1e-5)
