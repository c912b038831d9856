"""The interface of an engine, which runs a run's steps; it knows no implementation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from regate_ds.adapters.computed import Computed
from regate_ds.algorithm.plan import StepPlan
from regate_ds.data.collate import Batch
from regate_ds.job.process import Process
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus
from regate_ds.recipe.evaluation.forward import Predict
from regate_ds.recipe.saving.contents import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an engine is built from."""

    config: RunConfig
    corpus: Corpus
    process: Process
    """This process among all ranks of the job."""

    data: Process
    """This process among the ranks that read different samples."""

    total_steps: int
    computed: Computed

    saved: Checkpoint | None = None
    """What the run goes on from; None starts a new one."""

    @property
    def has_other_ranks(self) -> bool:
        """Whether the run goes on with other ranks: another number, or another layout."""
        if self.saved is None:
            return False
        done = self.saved.done
        return (done.num_ranks, done.layout) != (self.process.world_size, self.config.layout)


class Engine(Protocol):
    """Trains on windows; a window is the micro-batches of one optimizer step."""

    def windows(self, loader: Iterable[Batch]) -> Iterator[Any]:
        """Yield the loader's micro-batches, grouped into windows."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        ...

    def run_step(self, window: Any) -> list[Tensor]:
        """Run forward, backward and optimizer; return a loss for each micro-batch. Collective.

        The mean of the losses over micro-batches and data ranks is the step's loss.
        """
        ...

    def end_step(self) -> None:
        """Let the method remember the step's losses. Collective."""
        ...

    def plan(self) -> StepPlan | None:
        """Return the plan of the step run last, on this data rank; None if nothing is planned."""
        ...

    def counts(self) -> dict[str, Any] | None:
        """Return the step's counts of positions over all data ranks; None if nothing is planned."""
        ...

    def grad_norm(self) -> float | None:
        """Return the norm of the gradient before clipping; None where it is not measured."""
        ...

    def answering(self) -> AbstractContextManager[Predict]:
        """Return a context in which the dense student answers micro-batches, without training.

        Data ranks may give it different ones. Collective, as each answer is.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return the student's weights in the first rank's CPU memory, and nothing elsewhere.

        Their names are those of the Hugging Face model. The two matrices of an adapter stand beside
        the weight that they belong to: X.lora_A.weight, X.lora_B.weight, X.weight. Collective.
        """
        ...

    def save(self, checkpoint: Path) -> None:
        """Write this rank's part into a checkpoint's folder. Collective."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Load weights and optimizer. Collective."""
        ...

    def load_method(self, checkpoint: Path) -> None:
        """Load the method's own state. Collective."""
        ...
