"""Reference losses of a data set of users' own, in the words of their training loop.

Shapes: S positions of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regate_ds.data.keyed import Keyed, KeyedCollate
from regate_ds.data.llava.encode import EncodedSample
from regate_ds.job.process import start_process
from regate_ds.parallel.layout import ProcessGroup, num_ranks, size_of
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.teacher.config import TeacherConfig
from regate_ds.teacher.identity import teacher_id
from regate_ds.teacher.online import OnlineReference, WindowScorer, samples_of
from regate_ds.teacher.precompute import TeacherJob, Throughput, precompute
from regate_ds.teacher.scoring import score_samples
from regate_ds.teacher.sharding.placement import place_teacher, source_at


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen causal language model with the student's tokenizer."""

    model: nn.Module
    pad_id: int
    """The token that it reads in place of images."""

    image_token_id: int | None = None
    """The placeholder of an image in the student's input; None where there are no images."""

    tokens_per_batch: int = 8192
    """Upper limit of padded tokens in a forward pass; a longer sample is one of its own."""

    name: str | None = None
    """What stores call it; None hashes the model's configuration and weights."""

    replica: ProcessGroup | None = None
    """Ranks that hold the model together (``open_teacher``); None if this one has all of it."""

    in_step: bool = False
    """Whether all ranks must score equally often, as with ZeRO-3."""

    @property
    def id(self) -> str:
        return self.name or teacher_id(self.model, pad_id=self.pad_id)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def online(self, index: AnswerIndex | None = None) -> OnlineReference:
        """A ``reference`` for ``attach`` that scores while training: no store, no pass before.

        index: of the data, where it is known and does not change; samples are compared with it.
        """
        model = self.model.eval()
        scorer = WindowScorer(
            score=partial(score_samples, model, pad_id=self.pad_id),
            tokens_per_batch=self.tokens_per_batch,
            replica=self.replica,
            in_step=self.in_step,
            device=self.device,
        )
        return OnlineReference(
            scorer,
            partial(samples_of, image_token_id=self.image_token_id),
            teacher_id=self.id,
            index=index,
            model=model,
        )


def score_dataset(
    data: Keyed,
    collate_fn: Callable[[list[Any]], Any],
    teacher: Teacher,
    store: str | Path,
    group: ProcessGroup | None = None,
) -> Throughput:
    """Write the store that ``attach`` reads, for the same keys and labels. Resumable.

    data, collate_fn: those of the training loop; labels as Hugging Face models take them.
    group: ranks that share the work; all of them call it. A job of several ranks must name them.

    ValueError names the sample, or the store, that does not fit.
    """
    _require_group(teacher, group)
    collate = KeyedCollate(collate_fn)

    def sample(number: int) -> EncodedSample:
        (only,) = samples_of(collate([data[number]]), teacher.image_token_id)
        return only

    job = TeacherJob(
        index=AnswerIndex.build(sample(number) for number in range(len(data))),
        encode=sample,
        score=partial(score_samples, teacher.model.eval(), pad_id=teacher.pad_id),
        teacher_id=teacher.id,
        store=Path(store),
        tokens_per_batch=teacher.tokens_per_batch,
        ranks_per_replica=size_of(teacher.replica),
        in_step=teacher.in_step,
    )
    return precompute(job, group, teacher.device)


def _require_group(teacher: Teacher, group: ProcessGroup | None) -> None:
    """Ranks that do not share the work would all do it, and get in each other's way."""
    if group is None and num_ranks() > 1:
        raise ValueError(
            f"this job has {num_ranks()} ranks: give score_dataset the group of those that call "
            "it, as group=torch.distributed.group.WORLD, after they have joined"
        )
    if (teacher.replica is not None or teacher.in_step) and size_of(group) != num_ranks():
        raise ValueError(
            f"all {num_ranks()} ranks of the job hold this teacher together, and all must score: "
            "give group=torch.distributed.group.WORLD"
        )


def open_teacher(
    config: TeacherConfig, *, pad_id: int, image_token_id: int | None = None
) -> Teacher:
    """The model at ``config.path``, on the ranks of the job as ``config.sharding`` says.

    Collective over all ranks; before the student's engine is built. ``pad_id`` and
    ``image_token_id`` are those of ``Teacher``.

    ValueError for a teacher, or a number of ranks, that the sharding does not go with.
    """
    if config.path is None or config.tokenizer != "same":
        raise ValueError(
            f"teacher.path={config.path}, tokenizer={config.tokenizer}: outside the recipe a "
            "teacher is a model of its own that reads the student's token ids; name its folder or "
            "GGUF file, and leave tokenizer out"
        )
    placed = place_teacher(config, source_at(config.path), pad_id, start_process())
    return Teacher(
        model=placed.model,
        pad_id=pad_id,
        image_token_id=image_token_id,
        tokens_per_batch=config.tokens_per_batch,
        name=placed.id,
        replica=placed.layout.replica,
        in_step=placed.in_step,
    )
