"""Train a small decoder on blocks of tokens by one arm, and measure it on text it has not seen.

Shapes: N rows, B rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from regate_ds.adapters.torch.attach import attach
from regate_ds.adapters.torch.loop import LoopRegate
from regate_ds.adapters.torch.plain import Loop
from regate_ds.adapters.window import Window
from regate_ds.data.keyed import Keyed
from regate_ds.recipe.tasks.text.arms import TEXT_ARMS, TextArm
from regate_ds.recipe.tasks.text.blocks import TextBlocks
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.api import Teacher, score_dataset

WARMUP, LAST_LR = 0.05, 0.1
"""Share of the steps in which the learning rate rises, and what is left of it at the end."""


@dataclass(frozen=True, kw_only=True)
class TrialSizes:
    """How large a student, a step and a run are."""

    steps: int = 600
    rows: int = 8
    """Rows of a step."""

    hidden: int = 96
    layers: int = 4
    lr: float = 3e-3
    evaluations: int = 4
    """How often the held-out loss is taken, evenly over a run."""

    held_out_rows: int = 64


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one run gave."""

    arm: str
    seed: int
    points: list[tuple[int, float, float]]
    """Steps done, CPU seconds of training until then, and the held-out loss in nats a token."""

    tokens: int
    """Tokens of text that were read."""

    jump: dict[str, float]
    """``loss_merged`` and ``loss_single`` at the switch; empty without one."""

    teacher_seconds: float = 0.0
    """CPU seconds in which a teacher read the text, beside those of training."""

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TextBench:
    """What all runs of a benchmark share."""

    blocks: TextBlocks
    sizes: TrialSizes
    folder: Path
    """Where the ends of dense runs, and what they say of the text as teachers, are kept."""

    def dense_end(self, seed: int) -> Path:
        """Return the file with the weights at the end of a dense run."""
        return self.folder / f"dense-{seed}.pt"


def run_trial(bench: TextBench, name: str, *, seed: int) -> Trial:
    """Train by one of ``TEXT_ARMS`` and measure.

    ValueError if the text is too short for a run that reads none of it twice, or the arm needs a
    teacher and the dense run of this seed is not there.
    """
    arm, sizes = TEXT_ARMS[name], bench.sizes
    steps = round(arm.length * sizes.steps)
    long_NT, rows_NT = _rows_of(arm, bench, steps, seed)
    parts = [Keyed(_Rows(long_NT), "long"), Keyed(_Rows(rows_NT), "rows")]
    store, teacher_seconds = None, 0.0
    if arm.config.needs_reference:
        begin = time.process_time()
        store = _read_by_teacher(bench, parts[-1], seed)
        teacher_seconds = time.process_time() - begin
    model = text_student(bench.blocks, sizes, seed=seed)
    regate = attach(model, arm.config, total_steps=steps, reference=store)
    loaders = [DataLoader(part, sizes.rows, collate_fn=regate.collate(collate)) for part in parts]
    windows = (window for one in loaders if len(one) for window in regate.windows(one, Loop()))
    points, jump = _train(bench, model, regate, windows, steps)
    regate.remove()
    if name == "dense":
        torch.save(model.state_dict(), bench.dense_end(seed))
    return Trial(
        arm=name,
        seed=seed,
        points=points,
        tokens=long_NT.numel() + rows_NT.numel(),
        jump=jump,
        teacher_seconds=teacher_seconds,
    )


def _train(
    bench: TextBench, model: nn.Module, regate: LoopRegate, windows: Iterable[Window], steps: int
) -> tuple[list[tuple[int, float, float]], dict[str, float]]:
    """Return the points of a run and the figures of its switch, as ``Trial`` has them."""
    sizes = bench.sizes
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    points: list[tuple[int, float, float]] = []
    jump: dict[str, float] = {}
    seconds, begin, every = 0.0, time.process_time(), max(1, steps // sizes.evaluations)
    for step, window in enumerate(windows, start=1):
        for batch in window:
            regate.loss(model(**batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        regate.step(applied=True)
        jump |= {k: v for k, v in regate.figures().items() if k.startswith("loss_")}
        if step % every == 0 or step == steps:
            seconds += time.process_time() - begin
            points.append((step, seconds, held_out_loss(model, bench.blocks, sizes)))
            begin = time.process_time()
    return points, jump


def _rows_of(arm: TextArm, bench: TextBench, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the long rows of merged steps, where the arm has such, and the rows of the others.

    None is read twice; arms of one seed begin with the same text.
    """
    train_NT, sizes = bench.blocks.train_NT, bench.sizes
    merged = arm.config.merge.in_steps(steps) if arm.stretch > 1 else 0
    num_long = merged * sizes.rows * arm.stretch
    number = num_long + (steps - merged) * sizes.rows
    if number > len(train_NT):
        raise ValueError(
            f"a run reads {number} rows of {train_NT.shape[1]} tokens, the text has "
            f"{len(train_NT)} to train on; give more text, or fewer --steps or --rows"
        )
    order_N = torch.randperm(len(train_NT), generator=torch.Generator().manual_seed(seed))
    rows_NT = train_NT[order_N[:number]]
    long_NT = rows_NT[:num_long].reshape(-1, arm.stretch * rows_NT.shape[1])
    return long_NT, rows_NT[num_long:]


def _read_by_teacher(bench: TextBench, data: Keyed, seed: int) -> ReferenceStore:
    path, store = bench.dense_end(seed), bench.folder / f"store-{seed}"
    if not path.is_file():
        raise ValueError(
            f"{path}: the end of the dense run is the teacher, and it is not there; run the arm "
            "dense of this seed first"
        )
    model = text_student(bench.blocks, bench.sizes, seed=seed)
    model.load_state_dict(torch.load(path, weights_only=True))
    score_dataset(data, collate, Teacher(model=model, pad_id=0), store)
    return ReferenceStore(store)


def text_student(blocks: TextBlocks, sizes: TrialSizes, *, seed: int) -> nn.Module:
    """Return a fresh decoder; arms of one seed begin with the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(blocks.tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=8 * sizes.hidden // 3,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 32,
        num_key_value_heads=sizes.hidden // 32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every token of a row is to be predicted."""
    ids_BT = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids_BT, "labels": ids_BT.clone()}


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: TextBlocks, sizes: TrialSizes) -> float:
    """Return the mean loss of held-out tokens, by the model as it is used: a token a position."""
    rows_NT = blocks.held_out_NT[: sizes.held_out_rows]
    total = 0.0
    for ids_BT in rows_NT.split(sizes.rows):
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
        targets = ids_BT[:, 1:].reshape(-1)
        total += float(
            nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets, reduction="sum")
        )
    return total / (rows_NT.shape[0] * (rows_NT.shape[1] - 1))


def lr_factor(step: int, steps: int) -> float:
    """Return the share of the learning rate: a rise, then half a cosine down to ``LAST_LR``."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    place = (step - rise) / max(1, steps - rise)
    return LAST_LR + (1.0 - LAST_LR) * 0.5 * (1.0 + math.cos(math.pi * place))


class _Rows:
    """Rows as a data set of dicts."""

    def __init__(self, rows_NT: Tensor) -> None:
        self._rows_NT = rows_NT

    def __len__(self) -> int:
        return len(self._rows_NT)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows_NT[number]}
