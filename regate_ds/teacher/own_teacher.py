"""A teacher of users' own data that ranks hold as the recipe's do: whole, cut, or in pieces."""

from __future__ import annotations

from regate_ds.job.process import start_process
from regate_ds.recipe.config.sections import TeacherConfig
from regate_ds.teacher.api import Teacher
from regate_ds.teacher.sharding.placement import place_teacher, source_at


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
