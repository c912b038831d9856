"""Save and load the checkpoints of a run.

checkpoints/step-000120/          the engine's files, the method's state in regate/, and
                                  random-<rank>.pt; the file `complete`, see contents.py, is
                                  written last
checkpoints/latest                the name of the newest complete checkpoint
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from regate_ds.job.process import Process
from regate_ds.parallel.collectives import broadcast_text
from regate_ds.recipe.engines.base import Engine
from regate_ds.recipe.saving.contents import (
    COMPLETE,
    Checkpoint,
    Done,
    read_contents,
    write_contents,
)
from regate_ds.stores.atomic_file import sync_files, write_atomically

_NEW_RUN = "-"
"""In the place of a checkpoint's name."""


def newest_checkpoint(folder: Path) -> Checkpoint:
    """Return the newest complete checkpoint; ValueError if there is none, or its record is bad."""
    tag = latest(folder)
    if tag is None:
        raise ValueError(
            f"{folder} holds no complete checkpoint; to start anew, delete {folder.parent} or "
            "choose another run.out, and leave run.resume out"
        )
    return Checkpoint(folder=folder / tag, contents=read_contents(folder / tag))


def choose_checkpoint(folder: Path, process: Process, *, resumes: bool) -> Checkpoint | None:
    """Return the checkpoint that the run goes on from, None if it starts anew. Collective.

    The first rank chooses, and its ``resumes`` counts: others may see an older ``latest``, or none.
    ValueError if there is none, or its record is bad.
    """
    tag = newest_checkpoint(folder).folder.name if process.is_first and resumes else _NEW_RUN
    tag = broadcast_text(tag, process.group, process.device)
    if tag == _NEW_RUN:
        return None
    return Checkpoint(folder=folder / tag, contents=read_contents(folder / tag))


def save_checkpoint(folder: Path, done: Done, engine: Engine, process: Process) -> None:
    """Write everything that a resumed run needs, then name it in ``latest``. Collective."""
    tag = f"step-{done.step:06d}"
    if process.is_first and (folder / tag).exists():
        # It is left from before a resume at an earlier step: its files would mix with the new ones.
        _delete(folder / tag)
    dist.barrier()
    with writing(folder / tag):
        engine.save(folder / tag)
        torch.save(_random_state(process), folder / tag / f"random-{process.rank}.pt")
    dist.barrier()
    with writing(folder / tag):
        # Every rank calls it, because a node can sync only what was written on that node.
        sync_files(folder / tag)
    dist.barrier()
    with writing(folder / tag):
        write_contents(folder / tag, done, process)
        if process.is_first:
            write_atomically(folder / "latest", tag.encode())


def load_checkpoint(saved: Checkpoint, engine: Engine, process: Process, layout: str) -> None:
    """Load a checkpoint. Collective.

    ValueError if a file of it has changed. A rank that the saved run did not have keeps the random
    state that it has at the call. Under another ``layout`` than the saved one all ranks do: those
    that hold one copy of a module together must draw the same.
    """
    saved.contents.require_whole(saved.folder, process)
    with _reading(saved.folder):
        engine.load(saved.folder)
        random_file = saved.folder / f"random-{process.rank}.pt"
        is_mine = random_file.is_file() and saved.done.layout == layout
        random_state = torch.load(random_file, weights_only=True) if is_mine else None
    engine.load_method(saved.folder)
    if random_state is not None:
        _set_random_state(random_state, process)


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Turn a read error into a ValueError that names the checkpoint: torch's names no file."""
    try:
        yield
    except (EOFError, KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        # The further lines are torch's advice on settings, which would not help here.
        fault = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"{checkpoint} cannot be read ({fault}); name an earlier checkpoint in "
            f"{checkpoint.parent / 'latest'}"
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a write error into a RuntimeError that names the folder and the space that is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder.parent).free
        raise RuntimeError(
            f"{folder} cannot be written ({type(error).__name__}: {error}; {free / 1e6:.1f} MB are "
            "free there); make room for it or allow writing there, then resume"
        ) from error


def latest(folder: Path) -> str | None:
    """Return the tag of the newest complete checkpoint, or None if there is none.

    ValueError if ``latest`` names a missing folder.
    """
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    tag = pointer.read_text().strip()
    if not tag or not (folder / tag).is_dir():
        names = ", ".join(path.name for path in _by_step(folder)) or "none"
        raise ValueError(
            f"{pointer} names {tag!r}, which is no folder beside it; write the name of a "
            f"checkpoint into it (there are: {names})"
        )
    return tag


def prune_checkpoints(folder: Path, keep: int | None) -> None:
    """Delete all but the newest ``keep`` complete checkpoints; only one process calls it.

    A checkpoint beyond ``latest`` is left from before a resume at an earlier step: it is no newer
    than this run's, so it does not count, and stays until its step is saved again.
    """
    tag = latest(folder)
    if keep is None or tag is None:
        return
    own = [p for p in _by_step(folder) if _step(p) <= _step(folder / tag)]
    complete = [p for p in own if (p / COMPLETE).is_file() and p.name != tag]
    for old in complete[: max(0, len(complete) - keep + 1)]:
        _delete(old)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint, its mark first: one that is half deleted must not count as complete."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _by_step(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _random_state(process: Process) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(process.device)
    return states


def _set_random_state(states: dict[str, Tensor], process: Process) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], process.device)
