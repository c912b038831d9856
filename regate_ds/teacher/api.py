"""Score a user's own data set with a teacher: into a store before training, or while training.

Start with ``open_teacher``, then ``score_dataset`` or ``Teacher.online``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regate_ds.data.collate import Batch
from regate_ds.data.keyed import Keyed, KeyedCollate
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.job.process import start_process
from regate_ds.parallel.layout import ProcessGroup, num_ranks, require_group, size_of
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.spool import spooled
from regate_ds.teacher.config import TeacherConfig
from regate_ds.teacher.identity import teacher_id
from regate_ds.teacher.online import OnlineReference, WindowScorer, samples_of
from regate_ds.teacher.precompute import TeacherJob, Throughput, precompute
from regate_ds.teacher.scoring import ScoredSample, score_samples
from regate_ds.teacher.sharding.placement import place_teacher, source_at


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen causal language model that reads the student's token ids."""

    model: nn.Module
    """The model, on its device, with a decoder ``model`` and an ``lm_head``."""

    pad_id: int
    """Token id that the teacher reads in place of image placeholders."""

    image_token_id: int | None = None
    """Token id of an image placeholder in the student's input; None if the data has no images."""

    video_token_id: int | None = None
    """The same of a video, where the model has another one for it."""

    tokens_per_batch: int = 8192
    """Upper limit of padded tokens in a forward pass; a longer sample gets a pass of its own."""

    name: str | None = None
    """Name of the teacher in stores; None makes one by hashing its configuration and weights."""

    replica: ProcessGroup | None = None
    """Ranks that hold the model together (see ``open_teacher``); None if this rank has all of it.
    """

    in_step: bool = False
    """Whether all ranks must score equally often, as with ZeRO-3."""

    @property
    def id(self) -> str:
        """Name of the teacher in stores."""
        return self.name or teacher_id(self.model, pad_id=self.pad_id)

    @property
    def placeholder_ids(self) -> list[int]:
        ids = (self.image_token_id, self.video_token_id)
        return [number for number in ids if number is not None]

    @property
    def device(self) -> torch.device:
        """Device of the model's first weight."""
        return next(self.model.parameters()).device

    def samples_of(self, batch: Batch) -> list[EncodedSample]:
        """Return the samples of a micro-batch, as ``regate_ds.teacher.online.samples_of``.

        ValueError if it has pixels, of whose placeholders the teacher knows none.
        """
        pixels = [name for name in batch.inputs if name.startswith("pixel_values")]
        if pixels and not self.placeholder_ids:
            raise ValueError(
                f"the batch has {pixels[0]}, but Teacher(image_token_id=None) would read the "
                "placeholders of images as words; give image_token_id=model.config.image_token_id"
            )
        return samples_of(batch, self.placeholder_ids)

    def online(self, index: AnswerIndex | None = None) -> OnlineReference:
        """Make a ``reference`` for ``attach`` that scores while training, without a store.

        index: the answer index of the data, if the data is known beforehand and does not change;
        samples are then compared with it.
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
            self.samples_of,
            teacher_id=self.id,
            index=index,
            model=model,
        )


def score_dataset(
    data: Keyed | Iterable[Mapping[str, Any]],
    collate_fn: Callable[[list[Any]], Any],
    teacher: Teacher,
    store: str | Path,
    group: ProcessGroup | None = None,
) -> Throughput:
    """Score every sample once, and write the store that ``attach`` reads. Resumable.

    data, collate_fn: those of the training loop, so that keys and labels are the same; labels as
    Hugging Face models take them. ``data`` may be a stream whose items bring their keys
    (``stream_key``) and which gives each of them once: the first rank then reads it, and its
    samples' tokens lie beside the store (nine bytes each) until all of them are scored.
    group: the ranks that share the work; all of them make this call. A job of several ranks must
    give it.

    ValueError names the sample or the store that is refused. Samples without a label are named by
    a warning: an optimizer step that has no others would stop the run.
    """
    _require_group(teacher, group)
    collate, store = KeyedCollate(collate_fn), Path(store)

    def encode(item: Mapping[str, Any]) -> EncodedSample:
        (sample,) = teacher.samples_of(collate([item]))
        return sample

    def read_stream() -> Iterator[EncodedSample]:
        # Only the rank that reads it may ask for its iterator: a loader's workers then begin.
        for item in data:
            if not isinstance(item, Mapping):
                raise ValueError(
                    f"the stream gave a {type(item).__name__}; make it give dicts, one for each "
                    "sample"
                )
            yield from teacher.samples_of(collate([item]))

    score = partial(_score, teacher=teacher, store=store, group=group)
    if isinstance(data, Keyed):
        index = AnswerIndex.build(encode(data[number]) for number in range(len(data)))
        return score(index, lambda number: encode(data[number]))
    folder = store.absolute().with_name(f"{store.name}.spool")
    with spooled(folder, read_stream(), group, teacher.device) as spool:
        return score(AnswerIndex.build(spool), spool.read)


def _score(
    index: AnswerIndex,
    encode: Callable[[int], ScoredSample],
    *,
    teacher: Teacher,
    store: Path,
    group: ProcessGroup | None,
) -> Throughput:
    if not index.num_samples:
        raise ValueError("the data set has no samples, so there is nothing to score")
    _warn_of_unlabelled(index)
    job = TeacherJob(
        index=index,
        encode=encode,
        score=partial(score_samples, teacher.model.eval(), pad_id=teacher.pad_id),
        teacher_id=teacher.id,
        store=store,
        tokens_per_batch=teacher.tokens_per_batch,
        ranks_per_replica=size_of(teacher.replica),
        in_step=teacher.in_step,
    )
    return precompute(job, group, teacher.device)


def _warn_of_unlabelled(index: AnswerIndex) -> None:
    rows = (index.offsets.diff() == 0).nonzero()[:, 0].tolist()
    if rows:
        shown = ", ".join(str(tuple(index.keys[row])) for row in rows[:3])
        warnings.warn(
            f"{len(rows)} of {index.num_samples} samples have no label, such as {shown}: they "
            "teach nothing, and a step of such samples alone stops a run; leave them out",
            stacklevel=4,
        )


def _require_group(teacher: Teacher, group: ProcessGroup | None) -> None:
    """Refuse, by ValueError, ranks outside the group: they would all score and write everything."""
    require_group(group, "score_dataset")
    if (teacher.replica is not None or teacher.in_step) and size_of(group) != num_ranks():
        raise ValueError(
            f"all {num_ranks()} ranks of the job hold this teacher together, and all must score: "
            "give score_dataset group=torch.distributed.group.WORLD"
        )


def open_teacher(
    config: TeacherConfig,
    *,
    pad_id: int,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
) -> Teacher:
    """Load the teacher at ``config.path``, and place it on the ranks as ``config.sharding`` says.

    Collective over all ranks of the job, which it joins first. Call it before
    ``deepspeed.initialize`` builds the student. pad_id, image_token_id, video_token_id: see
    ``Teacher``.

    ValueError if there is no model at the path, or if the teacher or the number of ranks does not
    allow that sharding.
    """
    if config.path is None or config.tokenizer != "same" or config.column != "text":
        raise ValueError(
            f"teacher.path={config.path}, tokenizer={config.tokenizer}, column={config.column}: "
            "outside the recipe a teacher is a model of its own that reads the student's token "
            "ids; set path to its folder or GGUF file, and leave tokenizer and column out"
        )
    placed = place_teacher(config, source_at(config.path), pad_id, start_process())
    return Teacher(
        model=placed.model,
        pad_id=pad_id,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        tokens_per_batch=config.tokens_per_batch,
        name=placed.id,
        replica=placed.layout.replica,
        in_step=placed.in_step,
    )
