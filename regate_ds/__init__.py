"""ReGATE: train multimodal LLMs on the answer tokens that still teach them something.

The public names are loaded when they are asked for: importing this package needs torch only.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "RegateConfig": "regate_ds.config",
    "ScheduleConfig": "regate_ds.schedule_config",
    "ImagesConfig": "regate_ds.images_config",
    "MovingShare": "regate_ds.algorithm.schedule",
    "Regate": "regate_ds.session",
    "ReferenceStore": "regate_ds.stores.reference.reader",
    "Keyed": "regate_ds.data.keyed",
    "stream_key": "regate_ds.data.stream_key",
    "Teacher": "regate_ds.teacher.api",
    "score_dataset": "regate_ds.teacher.api",
    "TeacherConfig": "regate_ds.teacher.config",
    "open_teacher": "regate_ds.teacher.api",
    "ImageOrderStore": "regate_ds.stores.image_orders.reader",
    "rank_images": "regate_ds.ranking.api",
    "attach": "regate_ds.adapters.torch.attach",
    "Loop": "regate_ds.adapters.torch.plain",
    "watch_ranks": "regate_ds.job.supervise",
    "Scored": "regate_ds.adapters.trainers.scored",
    "attach_model": "regate_ds.adapters.huggingface.gates",
}

__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'regate_ds' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_HOME[name]), name)
