"""The teacher's losses of a data set that a trainer has prepared itself.

A trainer that tokenizes, cuts and packs the samples leaves nothing that a teacher could read
beforehand; so the teacher reads them when the trainer is made.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.api import Teacher, score_dataset
from regate_ds.teacher.backbone import text_backbone


@dataclass(frozen=True)
class Scored:
    """Give it as ``reference``: a teacher scores the trainer's samples once, into a folder.

    A second start with the same data and teacher finds them there.
    """

    store: str | Path
    """The folder of the losses."""

    teacher: Teacher | None = None
    """None is the student's own decoder and head, as they are before training and without adapters
    of PEFT."""

    def compute(
        self, trainer: Any, data: Any, collate_fn: Any, group: ProcessGroup | None
    ) -> ReferenceStore:
        """Score what is not scored yet, and open the store. Collective over the group.

        ValueError if the student cannot be its own teacher, or as ``score_dataset``.
        """
        teacher = self.teacher or _own_teacher(trainer)
        done = score_dataset(data, collate_fn, teacher, self.store, group)
        trainer.since_log.add_once("teacher_store_seconds", done.seconds)
        return ReferenceStore(self.store)


def _own_teacher(trainer: Any) -> Teacher:
    model, given = trainer.model, trainer.processing_class
    tokenizer = getattr(given, "tokenizer", given)
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise ValueError(
            "Scored(store) makes a teacher of the student, and needs its padding token: give "
            "processing_class, or Scored(store, Teacher(...))"
        )
    return Teacher(
        model=text_backbone(_without_adapters(model)),
        pad_id=tokenizer.pad_token_id,
        image_token_id=getattr(model.config, "image_token_id", None),
        video_token_id=getattr(model.config, "video_token_id", None),
    )


def _without_adapters(model: Any) -> Any:
    """Return the model that adapters of PEFT were added to, on the same weights."""
    if not hasattr(model, "get_base_model"):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning:
        return model.get_base_model()
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start != "gaussian":
        raise ValueError(
            f"Scored(store) makes a teacher of the student, but init_lora_weights={start!r} has "
            "changed its weights: give Scored(store, Teacher(...))"
        )
    shared = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).unload()
