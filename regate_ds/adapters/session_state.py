"""The session of a run and the difficulty it remembers, opened alike by every adapter."""

from __future__ import annotations

import torch

from regate_ds.config import RegateConfig
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.difficulty.stream import StreamDifficulty
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.online import OnlineReference

Difficulty = DifficultyStore | StreamDifficulty


def open_session(
    config: RegateConfig,
    reference: ReferenceStore | OnlineReference | None,
    layout: ParallelLayout,
    device: torch.device | str,
) -> tuple[Regate, Difficulty | None]:
    """``device``: where the backend of the layout's groups wants its tensors.

    No difficulty where nothing is elided. ValueError if elision has no reference.
    """
    difficulty: Difficulty | None = None
    if config.keep_share < 1.0 and reference is not None:
        if isinstance(reference, OnlineReference) and reference.is_stream:
            difficulty = StreamDifficulty(layout.data, device=device)
        else:
            difficulty = DifficultyStore(reference.index, layout.data, device=device)
    session = Regate(
        config, reference=reference, difficulty=difficulty, layout=layout, device=device
    )
    return session, difficulty
