"""What a complete checkpoint holds: the file ``complete``, which is written last.

It has what is done and by how many ranks, and a checksum of every other file. So a resume refuses
other data or another batch before a model is loaded, and a changed bit before the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from regate_ds.job.process import Process
from regate_ds.parallel.collectives import broadcast_text, sum_over
from regate_ds.stores.atomic_file import write_atomically
from regate_ds.stores.checksums import checksum_of
from regate_ds.stores.kind import sealed

COMPLETE = "complete"


@dataclass(frozen=True, kw_only=True)
class Done:
    """How many steps a checkpoint holds, on which data they were done, and by whom."""

    step: int
    """Number of optimizer steps that are done."""

    fingerprint: str
    """Fingerprint of the training set's index."""

    samples_per_step: int
    """Samples of an optimizer step, over all data ranks."""

    num_ranks: int
    """Ranks of the job that saved."""

    layout: str = ""
    """How the ranks held the model (`ParallelConfig.layout`); empty under DeepSpeed."""

    figures: str
    """Hash of the run's figures of these steps, as the first rank has it."""

    def require(self, fingerprint: str, samples_per_step: int) -> None:
        """Refuse, by ValueError, to resume with samples that would come in another order."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the checkpoint was written for data with fingerprint {self.fingerprint}, but "
                f"this job's data has {fingerprint}; resume with the same data, images and chat "
                "template"
            )
        if samples_per_step != self.samples_per_step:
            raise ValueError(
                f"the checkpoint was written by a run of {self.samples_per_step} samples a step, "
                f"but run.micro_batch * run.accumulation * data ranks is {samples_per_step} here; "
                f"set run.accumulation or run.micro_batch so that it is {self.samples_per_step}"
            )


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint's record of itself."""

    done: Done
    checksums: Mapping[str, int]
    """By the name of a file in its folder."""

    def require_whole(self, folder: Path, process: Process) -> None:
        """Refuse, by ValueError on all ranks, a checkpoint with a changed file. Collective."""
        names = list(self.checksums)
        for name, found in zip(names, _checksums(folder, names, process), strict=True):
            if found != self.checksums[name]:
                raise ValueError(
                    f"{folder / name} is missing or not what was saved; name an earlier checkpoint "
                    f"in {folder.parent / 'latest'}"
                )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint that a run goes on from."""

    folder: Path
    contents: Contents

    @property
    def done(self) -> Done:
        return self.contents.done


def read_contents(folder: Path) -> Contents:
    """Read a complete checkpoint's record. ValueError names the file if it is damaged."""
    path = folder / COMPLETE
    if not path.is_file():
        raise ValueError(
            f"{folder} is not complete: it has no file {COMPLETE}; name an earlier checkpoint in "
            f"{folder.parent / 'latest'}"
        )
    try:
        content = path.read_bytes()
        tree = json.loads(content)
        if sealed(tree) != content:
            raise ValueError("its checksum is another")
        return Contents(done=Done(**tree["done"]), checksums=tree["checksums"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); name an earlier checkpoint "
            f"in {folder.parent / 'latest'}"
        ) from None


def write_contents(folder: Path, done: Done, process: Process) -> None:
    """Record what a checkpoint holds, which completes it. Collective.

    ValueError on all ranks if one of them does not see a file: it could not be resumed from.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = json.loads(
        broadcast_text(
            json.dumps([path.relative_to(folder).as_posix() for path in files]),
            process.group,
            process.device,
        )
    )
    checksums = dict(zip(names, _checksums(folder, names, process), strict=True))
    if unseen := [name for name, checksum in checksums.items() if not checksum]:
        raise ValueError(
            f"{folder / unseen[0]} is seen by the first rank, but not by all; put run.out in a "
            "folder that all nodes share"
        )
    if process.is_first:
        content = sealed({"done": asdict(done), "checksums": checksums})
        write_atomically(folder / COMPLETE, content)


def _checksums(folder: Path, names: Sequence[str], process: Process) -> list[int]:
    """Return a checksum for each file, 0 where there is none; each rank reads its share of them."""
    mine = [0] * len(names)
    for place in range(process.rank, len(names), process.world_size):
        path = folder / names[place]
        mine[place] = checksum_of(path) if path.is_file() else 0
    return sum_over(mine, process.group, process.device)
