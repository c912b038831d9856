"""Open, save and load the session of a run and the difficulty that it remembers.

All adapters share these functions. In a checkpoint the schedule is one file, and the difficulty is
one file for each data rank.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from regate_ds.config import RegateConfig
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.session import Regate
from regate_ds.stores.atomic_file import write_atomically
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
    """Make the session of a run and its difficulty; the difficulty is None if nothing is elided.

    device: where the backend of the layout's groups wants its tensors.

    ValueError if elision has no reference.
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


STATE_FOLDER = "regate"
"""Name of the folder inside a checkpoint that holds the method's state."""


def save_state(
    checkpoint_dir: str | Path,
    session: Regate,
    difficulty: Difficulty | None,
    *,
    is_first: bool,
) -> None:
    """Write schedule and difficulty into the checkpoint.

    Every data rank calls it and writes its part of the difficulty; the rank with ``is_first`` also
    writes the schedule, which all ranks share.
    """
    folder = Path(checkpoint_dir) / STATE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    state = session.state_dict()
    if difficulty is not None:
        difficulty.save(folder)
        state |= {"num_files": difficulty.num_ranks, "num_writes": difficulty.num_writes}
    if is_first:
        write_atomically(folder / "state.json", json.dumps(state).encode())


def load_state(checkpoint_dir: str | Path, session: Regate, difficulty: Difficulty | None) -> None:
    """Load what ``save_state`` wrote; the number of data ranks may differ from the saved one.

    ValueError if the checkpoint is incomplete, or does not fit the run.
    """
    folder = Path(checkpoint_dir) / STATE_FOLDER
    if not (folder / "state.json").is_file():
        raise ValueError(f"{folder} has no state.json; resume from a checkpoint of regate.save")
    state = json.loads((folder / "state.json").read_text())
    session.load_state_dict(state)
    if difficulty is None:
        return
    if "num_files" not in state:
        raise ValueError(
            f"{folder} is of a dense run without difficulty; set keep_share=1.0, or resume from a "
            "checkpoint of a run that elides tokens"
        )
    difficulty.load(folder, num_ranks=state["num_files"])
    if difficulty.num_writes != state["num_writes"]:
        raise ValueError(
            f"{folder}: the difficulty was written {difficulty.num_writes} times, its "
            f"state.json says {state['num_writes']}: a save over an older one was interrupted; "
            "resume from another checkpoint, and save each checkpoint into its own folder"
        )
