"""The settings of a teacher, as the `teacher` section of a YAML and ``open_teacher`` take them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regate_ds.settings.refuse import require


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen text-only reference, scored once before training, or along with it."""

    path: Path | None = None
    """Directory or GGUF file of a causal language model; null is the student's text backbone."""

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
