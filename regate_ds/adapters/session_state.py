"""Open, save and load the session of a run and the difficulty that it remembers.

All adapters share these functions. In a checkpoint the schedule is one file, and the difficulty is
one file for each data rank.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile, ZipInfo

from regate_ds.adapters.computed import Computed, Reference
from regate_ds.algorithm.rows import RowLayout
from regate_ds.config import RegateConfig
from regate_ds.parallel.collectives import gather_objects
from regate_ds.parallel.layout import ParallelLayout, ProcessGroup
from regate_ds.session import Regate
from regate_ds.settings.section import plain_values
from regate_ds.stores.atomic_file import write_atomically
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.difficulty.stream import StreamDifficulty
from regate_ds.stores.kind import sealed
from regate_ds.stores.values import Stores
from regate_ds.teacher.online import OnlineReference

Difficulty = DifficultyStore | StreamDifficulty

_log = logging.getLogger(__name__)

STATE_FOLDER = "regate"
"""Name of the folder inside a checkpoint that holds the method's state."""


@dataclass(frozen=True)
class Opened:
    """The session of a run, and what it remembers."""

    session: Regate
    difficulty: Difficulty | None
    """None where the score remembers nothing."""

    group: ProcessGroup | None = None
    """The data ranks; None is one."""

    def save(self, checkpoint_dir: str | Path) -> None:
        """Write schedule and difficulty into the checkpoint.

        Every data rank calls it and writes its part of the difficulty; the first one also writes
        what all ranks share.
        """
        folder = Path(checkpoint_dir) / STATE_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        state = {**self.session.state_dict(), "elision": plain_values(self.session.config)}
        if self.difficulty is not None:
            self.difficulty.save(folder)
            state |= {
                "num_files": self.difficulty.num_ranks,
                "num_writes": self.difficulty.num_writes,
            }
        if self.session.is_first:
            write_atomically(folder / "state.json", sealed(state))

    def load(self, checkpoint_dir: str | Path) -> None:
        """Load what ``save`` wrote; the number of data ranks may differ from the saved one.

        ValueError if the checkpoint is incomplete, or does not fit the run.
        """
        state, folder = read_state(checkpoint_dir), Path(checkpoint_dir) / STATE_FOLDER
        self.session.require_state(state)
        warn_of_changes(state.get("elision", {}), plain_values(self.session.config))
        self._load_difficulty(state, folder)
        self.session.load_state_dict(state)

    def packed(self) -> bytes:
        """Return the files that ``save`` writes, of all data ranks, as a zip file in memory.

        Collective over data ranks; the result is the same on all of them.
        """
        with TemporaryDirectory() as folder:
            self.save(folder)
            own = {path.name: path.read_bytes() for path in Path(folder, STATE_FOLDER).iterdir()}
        files = gather_objects(own, self.group)
        packed = BytesIO()
        with ZipFile(packed, "w") as into:
            for each in files:
                for name, content in each.items():
                    # A fixed date, so that ranks have the same bytes.
                    into.writestr(ZipInfo(name), content)
        return packed.getvalue()

    def unpack(self, packed: bytes) -> None:
        """Load what ``packed`` returned, as ``load`` does."""
        with TemporaryDirectory() as folder:
            with ZipFile(BytesIO(packed)) as files:
                files.extractall(Path(folder, STATE_FOLDER))
            self.load(folder)

    def _load_difficulty(self, state: dict[str, Any], folder: Path) -> None:
        if self.difficulty is None:
            return
        if "num_files" not in state:
            raise ValueError(
                f"{folder} is of a run without difficulty, as a dense one; set execution=none, or "
                "resume from a checkpoint of a run with this score"
            )
        self.difficulty.load(folder, num_ranks=state["num_files"])
        if self.difficulty.num_writes != state["num_writes"]:
            raise ValueError(
                f"{folder}: the difficulty was written {self.difficulty.num_writes} times, its "
                f"state.json says {state['num_writes']}: a save over an older one was "
                "interrupted; resume from another checkpoint, and save each checkpoint into its "
                "own folder"
            )


def warn_of_changes(saved: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> None:
    """Log a line for each knob that differs from the checkpoint's run: that is allowed, and the run
    is then another one than if it had never stopped."""
    for key in (key for key in now if key in saved and saved[key] != now[key]):
        if isinstance(now[key], Mapping) and isinstance(saved[key], Mapping):
            warn_of_changes(saved[key], now[key], f"{where}{key}.")
        else:
            _log.warning(
                "resumed with %s%s=%s, but the checkpoint's run had %s",
                where,
                key,
                now[key],
                saved[key],
            )


def read_state(checkpoint_dir: str | Path) -> dict[str, Any]:
    """Return what all ranks share of a checkpoint; ValueError if it has none, or a damaged one."""
    folder = Path(checkpoint_dir) / STATE_FOLDER
    path = folder / "state.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no state.json; resume from a checkpoint of regate.save")
    content = path.read_bytes()
    try:
        state = json.loads(content)
        if "sha256" not in state:
            raise ValueError("it has no checksum: an earlier version may have saved it")
        if sealed(state) != content:
            raise ValueError("its text does not match its checksum")
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); resume from another checkpoint of regate.save"
        ) from error
    return {name: value for name, value in state.items() if name != "sha256"}


def open_session(
    config: RegateConfig,
    computed: Computed,
    layout: ParallelLayout,
    *,
    total_steps: int,
    rows: RowLayout | None = None,
) -> Opened:
    """Make the session of a run of ``total_steps`` steps, and the difficulty that its score needs.

    ValueError if the score needs reference losses and has none, or the ranking orders.
    """
    reference = computed.reference
    difficulty = _difficulty(config, reference, layout) if config.statistics else None
    stores = Stores(reference, difficulty, computed.orders)
    session = Regate(config, stores, total_steps=total_steps, layout=layout, rows=rows)
    return Opened(session, difficulty, layout.data)


def _difficulty(
    config: RegateConfig, reference: Reference | None, layout: ParallelLayout
) -> Difficulty | None:
    columns = {statistic.name: statistic.unseen for statistic in config.statistics}
    if reference is None and config.needs_reference:
        return None
    is_stream = isinstance(reference, OnlineReference) and reference.is_stream
    if reference is None or is_stream:
        # Nothing lists the samples beforehand.
        return StreamDifficulty(layout.data, columns=columns, device=layout.device)
    return DifficultyStore(reference.index, layout.data, columns=columns, device=layout.device)
