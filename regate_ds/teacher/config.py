"""The settings of a teacher, as the `teacher` section of a YAML and ``open_teacher`` take them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regate_ds.algorithm.scores.score import Column
from regate_ds.settings.refuse import require


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen text-only reference, scored once before training, or along with it."""

    path: Path | None = None
    """Directory or GGUF file of a causal language model; null is the student's text backbone."""

    column: Column = "text"
    """What is scored: `text` by the teacher, `student` by the student's starting weights with the
    image, `gain` by both: the first less the second. It must be what the score reads."""

    tokenizer: Literal["same", "own"] = "same"
    """`same` refuses a teacher at `path` whose tokenizer is not the student's; `own` accepts any
    and aligns the losses by characters."""

    mode: Literal["store", "online"] = "store"
    """Read the losses from `store`, or let the teacher run inside the training job."""

    store: Path | None = None
    """Folder of the reference losses: written by `regate teacher`, read by `regate train`."""

    tokens_per_batch: int = 16384
    """Upper limit of padded tokens in one forward pass of the teacher."""

    sharding: Literal["none", "tensor", "zero3"] = "none"
    """Weights whole on every rank, cut by heads over `tensor` ranks, or in ZeRO-3's pieces."""

    tensor: int = 1
    """Ranks that hold one teacher together where `sharding` is `tensor`."""

    verify: Literal["quick", "full"] = "quick"
    """Compare a store's values with their checksums as they are read, or every byte on opening."""

    def __post_init__(self) -> None:
        require(self, "tokens_per_batch", self.tokens_per_batch >= 1, "must be at least 1")
        if self.sharding == "tensor":
            require(self, "tensor", self.tensor >= 2, "sharding=tensor needs at least 2")
        else:
            require(self, "tensor", self.tensor == 1, f"sharding={self.sharding} allows 1 only")
        is_readable = self.tokenizer == "same" or self.path is not None
        problem = "needs a teacher of its own: name one in teacher.path"
        require(self, "tokenizer", is_readable, problem)
        if self.column != "text":
            self._require_student()

    def _require_student(self) -> None:
        """Refuse what a column of the student's own losses does not allow."""
        by = f"column={self.column}"
        require(self, "mode", self.mode == "store", f"{by} is computed once; use mode=store")
        problem = f"{by} runs the whole student on every rank; use sharding=none"
        require(self, "sharding", self.sharding == "none", problem)
        is_read = self.column == "gain" or self.path is None
        require(self, "path", is_read, f"{by} reads no other model; leave path out, or use gain")
