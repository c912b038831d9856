"""Runs of the recipe with `parallel`, on every rank's worker."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func

from regate_ds.adapters.megatron_on_cpu.modules import layer_spec
from regate_ds.job.process import Process
from regate_ds.recipe.config import megatron_limits as fits
from regate_ds.recipe.config.sections import ParallelConfig
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus, loads_whole
from regate_ds.recipe.engines.megatron import decoder
from regate_ds.recipe.engines.megatron.chunks import build_chunks
from regate_ds.recipe.engines.megatron.engine import MegatronEngine, forward_step
from regate_ds.recipe.preflight import judge_run
from regate_ds.recipe.saving.model import save_model
from regate_ds.recipe.students.config import ModelConfig
from regate_ds.recipe.students.load import load_student
from regate_ds.recipe.trainer import Trainer
from regate_ds.teacher.sharding.weights import SavedWeights, WeightCut
from tests.adapters.megatron.build_helper import join
from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.checks_helper import dismantle


@dataclass(frozen=True)
class Run:
    """A run of the corpus in ``folder``; the weights, metrics and checkpoints go to ``out``."""

    folder: Path
    out: str
    overrides: tuple[str, ...]
    stop_after: int | None = None
    """Steps after which the machine is lost."""


@dataclass(frozen=True)
class Reading:
    """The student of the corpus in ``folder``, read by the ranks of a layout."""

    folder: Path
    layout: Case


class Killed(Exception):
    pass


class KilledTrainer(Trainer):
    """Stops as a lost machine would: nothing is written."""

    stop_after = 0

    def _after(self, done: int) -> None:
        super()._after(done)
        if done == self.stop_after:
            raise Killed


def trainer_of(run: Run, kind: type[Trainer] = Trainer) -> Trainer:
    config = load_config(
        run.folder / "run.yaml", [f"run.out={run.folder / run.out}", *run.overrides]
    )
    judge_run(config)
    # The shim has one random state, and Megatron's seeds leave it as the last case left it.
    torch.manual_seed(0)
    # As at a job's start: no rank begins the run before all have judged it.
    dist.barrier()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    corpus = load_corpus(config, weights=loads_whole(config))
    return kind(config, corpus, Process(rank, world_size, torch.device("cpu")))


def train(run: Run) -> None:
    trainer = trainer_of(run, Trainer if run.stop_after is None else KilledTrainer)
    assert isinstance(trainer.engine, MegatronEngine)
    if isinstance(trainer, KilledTrainer):
        trainer.stop_after = run.stop_after
    try:
        trainer.run()
    except Killed:
        assert run.stop_after is not None
    # No rank has had the whole student: neither to begin with, nor to evaluate or write it.
    assert all(weight.is_meta for weight in trainer.corpus.student.model.parameters())
    dismantle(trainer.engine.chunks)


def check_reading(case: Reading) -> None:
    """This rank reads as many numbers as it has, which are those of a student loaded whole."""
    join(case.layout)
    folder, read = case.folder / "student", []

    def counted(self: SavedWeights, name: str, cut: WeightCut | None = None) -> torch.Tensor:
        read.append(part := own_read(self, name, cut))
        return part

    own_read, made = SavedWeights.read, []
    cut = case.layout
    layout = ParallelConfig(tensor=cut.tp, pipeline=cut.pp, sequence=cut.sp, expert=cut.ep)
    with mock.patch.object(SavedWeights, "read", counted):
        for is_whole in (False, True):
            student = load_student(folder, weights=is_whole)
            made += build_chunks(student, ModelConfig(path=folder), layout, torch.float32, 0)
            if not is_whole:
                assert all(weight.is_meta for weight in student.model.parameters())
    mine, theirs = (list(chunk.parameters()) for chunk in made)
    assert sum(part.numel() for part in read) == sum(weight.numel() for weight in mine)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    dismantle(made)


def _own_layers(**settings: Any) -> Any:
    return layer_spec(get_gpt_layer_local_spec(**settings), own_attention=True)


def train_with_own_attention(run: Run) -> None:
    """Packed rows and context ranks, in the place of Transformer Engine's attention."""
    with (
        mock.patch.object(fits, "is_installed", return_value=True),
        mock.patch.object(decoder, "get_gpt_layer_local_spec", _own_layers),
    ):
        train(run)


def train_with_teacher(run: Run) -> None:
    """A run whose teacher is in the job: it asks how the ranks were started, before it is loaded.

    Context ranks and packed rows as in ``train_with_own_attention``.
    """
    with mock.patch.dict(os.environ, {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}):
        train_with_own_attention(run)


def train_plainly(run: Run) -> None:
    """Megatron's own loop over the same micro-batches, without us: the same weights bit for bit."""
    trainer = trainer_of(run)
    assert isinstance(trainer.engine, MegatronEngine)
    host, schedule = trainer.engine, get_forward_backward_func()
    assert not any(m._forward_pre_hooks for chunk in host.chunks for m in chunk.modules())
    for step, window in enumerate(host.windows(trainer.loader(0))):
        for chunk in host.chunks:
            chunk.zero_grad_buffer()
        host.optimizer.zero_grad()
        for group in host.optimizer.param_groups:
            group["lr"] = 1e-3 * [1 / 3, 2 / 3][step]
        schedule(
            forward_step_func=forward_step,
            data_iterator=iter(window),
            model=host.chunks[0],
            num_microbatches=len(window),
            seq_length=window[0].tokens.segment_BT.shape[1],
            micro_batch_size=2,
            forward_only=False,
        )
        host.optimizer.step()
    save_model(trainer.folder.model, trainer.corpus.student, host.weights(), trainer.process)
    dismantle(host.chunks)
