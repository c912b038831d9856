"""What carries out a run's steps: the interface, which knows no implementation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from regate_ds.config import RegateConfig
from regate_ds.data.collate import Batch
from regate_ds.job.process import Process
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.online import OnlineReference


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a host is built from."""

    config: RunConfig
    corpus: Corpus
    process: Process
    """Among all ranks of the job."""

    data: Process
    """Among those ranks that read different samples."""

    regate_config: RegateConfig
    total_steps: int
    reference: ReferenceStore | OnlineReference | None


class Engine(Protocol):
    """Takes windows, the micro-batches of one optimizer step, and trains on them."""

    def windows(self, loader: Iterable[Batch]) -> Iterator[Any]:
        """The loader's micro-batches in groups of one optimizer step."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        ...

    def run_step(self, window: Any) -> list[Tensor]:
        """Forward, backward and optimizer. The loss of each micro-batch of this data rank: the
        mean over micro-batches and data ranks is the step's loss. Collective."""
        ...

    def end_step(self) -> None:
        """Let the method remember the step's losses. Collective."""
        ...

    def counts(self) -> dict[str, Any] | None:
        """Positions of the step over all data ranks; None if nothing is planned."""
        ...

    def grad_norm(self) -> float | None:
        """Before clipping; None where the host does not tell."""
        ...

    def full_model(self) -> AbstractContextManager[nn.Module]:
        """The student in the Hugging Face form, to be run or written. Collective."""
        ...

    def save(self, checkpoint: Path, done: dict[str, Any]) -> None:
        """Write this rank's part into a checkpoint's folder. Collective."""
        ...

    def require_ranks(self, checkpoint: Path, num_saved: int) -> None:
        """ValueError if a checkpoint of so many ranks cannot be read by this job's."""
        ...

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Take over weights and optimizer; what was ``done``. Collective."""
        ...

    def load_method(self, checkpoint: Path) -> None:
        """Take over the method's own state. Collective."""
        ...
