"""The configuration of `regate pretrain`: what each key means, and which values it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from regate_ds.objectives.contract import Objective
from regate_ds.objectives.replaced_token import ReplacedToken
from regate_ds.objectives.table import OBJECTIVES
from regate_ds.recipe.config.tree import read_tree
from regate_ds.recipe.optimizer import OptimizerConfig
from regate_ds.settings.refuse import require
from regate_ds.settings.section import read_section


@dataclass(frozen=True, kw_only=True)
class PretrainData:
    """The text, or the pictures with their texts, and how they become rows."""

    path: Path
    """A text file, or a folder of them; with `pictures` a JSONL file, each line of which has
    `image`, a path from the file's folder, and `text`."""

    pictures: bool = False
    """True reads a picture before each text."""

    by: Literal["line", "paragraph"] = "line"
    """What a document of a text is. Documents stand one behind another in rows; each text of a
    picture has a row of its own."""

    length: int = 128
    """Tokens of a row; of a picture's text, the most."""

    patch: int = 16
    """Side of a picture's patch in pixels."""

    held_out: float = 0.05
    """Share of the documents that nothing is trained on."""

    vocab_size: int = 4096
    """Tokens of the tokenizer, which is trained on the documents; the mask is one more."""

    def __post_init__(self) -> None:
        require(self, "length", self.length >= 2, "must be at least 2")
        require(self, "patch", self.patch >= 1, "must be at least 1")
        require(self, "held_out", 0.0 < self.held_out < 1.0, "must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class PretrainRun:
    """The run's length, batch, precision and checkpoints, and the folder of its results."""

    out: Path
    """The run folder: configuration, metrics, summary, checkpoints and the model."""

    steps: int
    """Optimizer steps of the run."""

    micro_batch: int = 16
    """Rows of one forward pass on each rank."""

    accumulation: int = 1
    """Micro-batches of one optimizer step on each rank."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of weights and activations; bf16 keeps fp32 master weights."""

    seed: int = 0
    """Seed of new weights, of the order of rows, of what is drawn for them, and of dropout."""

    eval_every: int = 0
    """Number of steps between evaluations; 0 evaluates at the end only."""

    eval_rows: int = 512
    """Number of held-out rows that an evaluation reads, at most."""

    save_every: int = 0
    """Number of steps between checkpoints; 0 writes one at the end only."""

    keep_checkpoints: int | None = 2
    """Number of newest checkpoints that stay on disk; null keeps all."""

    deepspeed: Path | dict[str, Any] | None = None
    """The user's own DeepSpeed configuration, a JSON file or its content; null is ZeRO stage 0."""

    resume: Literal[False, True, "auto"] = False
    """True resumes from the newest checkpoint in `out`; auto resumes if there is one."""

    grace_seconds: int | None = None
    """After SIGTERM or SIGUSR1 a run ends its step, saves and exits with code 75; if that takes
    more than this many seconds, it exits at once with code 143; null sets no limit."""

    def __post_init__(self) -> None:
        for key in ("steps", "micro_batch", "accumulation", "eval_rows"):
            require(self, key, getattr(self, key) >= 1, "must be at least 1")
        for key in ("seed", "eval_every", "save_every"):
            require(self, key, getattr(self, key) >= 0, "must be 0 or more")
        for key in ("keep_checkpoints", "grace_seconds"):
            value = getattr(self, key)
            require(self, key, value is None or value >= 1, "must be at least 1, or null")


@dataclass(frozen=True, kw_only=True)
class PretrainTree:
    """The whole tree."""

    CHOICES: ClassVar[dict[str, dict[str, Any]]] = {"objective": OBJECTIVES}

    model: dict[str, Any]
    """Fields of the main model's Hugging Face config, `model_type` among them. The size of the
    vocabulary is the tokenizer's."""

    helper: dict[str, Any] = field(default_factory=dict)
    """Fields of the helper's config that differ from the main model's divided by the objective's
    divisor."""

    data: PretrainData
    objective: Objective = field(default_factory=ReplacedToken)
    """What is trained for."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: PretrainRun

    def __post_init__(self) -> None:
        name = next(n for n, kind in OBJECTIVES.items() if type(self.objective) is kind)
        if self.data.pictures and not self.objective.takes_pictures:
            able = ", ".join(n for n, kind in OBJECTIVES.items() if kind().takes_pictures)
            raise ValueError(
                f"data.pictures=True: objective={name} reads text alone; take one of {able}"
            )
        if self.helper and self.objective.helper_divisor is None:
            raise ValueError(f"helper={self.helper}: objective={name} has no helper; leave it out")


def load_pretrain(path: Path, overrides: Sequence[str] = ()) -> PretrainTree:
    """Read a YAML file, apply overrides (``section.key=value``), judge the result.

    ValueError is one line with the file, the key, its value and what is allowed.
    """
    tree = read_tree(path, overrides)
    try:
        return read_section(PretrainTree, tree, where="")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
