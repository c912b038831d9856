"""The sections of a run's configuration: what each key means, and which values it refuses.

Paths are relative to the folder that the command runs in. Values that contradict each other across
sections are refused in tree.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regate_ds.data.llava.template import Template
from regate_ds.settings.refuse import require
from regate_ds.stores.kind import Verify


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and held-out samples, and how they are encoded."""

    train: Path
    """The training samples: a JSON, JSONL or Parquet file, shards, or a folder
    (docs/data_formats.md)."""

    test: Path | None = None
    """The held-out samples, in the same forms; null trains without evaluation."""

    image_root: Path | None = None
    """Folder that the image paths start from; null is the folder of each data file."""

    inside_root: bool = False
    """True refuses image and video paths that lead out of that folder, also by a link."""

    name: str = "train"
    """Name of the training set in the sample keys; the reference store is bound to it."""

    max_length: int = 2048
    """Longer samples are cut to this many tokens, image tokens included."""

    template: Template | None = None
    """Text around the turns of a conversation (see `data.template.*`); null takes the chat template
    of the model's own processor, and the defaults where its folder has none."""

    skip_bad: bool = False
    """True leaves bad records out and reports them; false stops at the first one."""

    cache: Path | None = None
    """Folder of what is computed once of the data files: the index of their samples; null is
    `.regate_cache` beside each file, or `data_cache` in the run folder where that is not possible.
    """

    pack_length: int | None = None
    """Largest length, in tokens, of a row of several samples; null puts one sample in each row."""

    video_frames: int | None = None
    """Number of frames to take from a video that is a file, at even distances; null leaves them to
    the model's own processor, and refuses such files where `data.template` writes the samples."""

    num_workers: int = 2
    """Processes of each rank that decode images; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        require(self, "name", self.name != "", "must not be empty")
        require(self, "max_length", self.max_length >= 2, "must be at least 2")
        require(
            self,
            "pack_length",
            self.pack_length is None or self.pack_length >= self.max_length,
            f"must be at least max_length={self.max_length}, or null",
        )
        frames = self.video_frames
        require(self, "video_frames", frames is None or frames >= 1, "must be at least 1, or null")
        require(self, "num_workers", self.num_workers >= 0, "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """The orders of image tokens, computed once before training where the ranking reads them."""

    store: Path | None = None
    """Folder of the orders: written by `regate rank`, read by `regate train`."""

    batch: int = 16
    """Images of one forward pass of the vision tower in `regate rank`."""

    verify: Verify = "quick"
    """Compare a store's orders with their checksums as they are read, or every byte on opening."""

    def __post_init__(self) -> None:
        require(self, "batch", self.batch >= 1, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How Megatron-core cuts the model; ranks beyond one copy of it are data ranks."""

    tensor: int = 1
    """Ranks that share each layer's matrices."""

    pipeline: int = 1
    """Stages of the decoder, each on ranks of its own."""

    context: int = 1
    """Ranks that share each sample's positions (needs Transformer Engine)."""

    expert: int = 1
    """Ranks of a stage that each hold some of a layer's experts whole; 1 cuts each expert over the
    tensor ranks."""

    virtual: int = 1
    """Parts of the decoder on each stage; above 1 the schedule interleaves them."""

    sequence: bool = False
    """True cuts the activations between the matrices over the tensor ranks."""

    distributed_optimizer: bool = False
    """True cuts the optimizer's state over the data ranks."""

    row_format: Literal["padded", "ragged"] = "padded"
    """`padded` puts kept tokens in rows of one length; `ragged` puts them one after the other and
    needs Transformer Engine."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing, attention, or whole layers."""

    def __post_init__(self) -> None:
        for key in ("tensor", "pipeline", "context", "expert", "virtual"):
            require(self, key, getattr(self, key) >= 1, "must be at least 1")
        stages, tensor = self.pipeline > 1, self.tensor > 1
        require(self, "virtual", self.virtual == 1 or stages, "needs parallel.pipeline above 1")
        require(self, "sequence", not self.sequence or tensor, "needs parallel.tensor above 1")

    @property
    def layout(self) -> str:
        """How the ranks hold the model, in words."""
        experts = f", expert {self.expert}" if self.expert > 1 else ""
        return (
            f"tensor {self.tensor}, pipeline {self.pipeline}, context {self.context}, "
            f"virtual {self.virtual}{experts}"
        )

    @property
    def ranks_per_copy(self) -> int:
        """Number of ranks that hold one copy of the model; they read the same samples."""
        return self.tensor * self.pipeline * self.context

    @property
    def weight_parts(self) -> int:
        """Number of ranks that the weights of one copy of the model are cut over."""
        return self.tensor * self.pipeline

    @property
    def expert_parts(self) -> int:
        """Number of ranks that the experts of one copy of the model are cut or shared over."""
        return self.pipeline * (self.expert if self.expert > 1 else self.tensor)


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run's length, batch, precision and checkpoints, and the folder of its results."""

    out: Path
    """The run folder: configuration, metrics, summary and checkpoints."""

    epochs: int = 1
    """Passes over the training samples."""

    steps: int | None = None
    """Optimizer steps of the run, in place of `epochs`; null leaves it to `epochs`."""

    micro_batch: int = 1
    """Samples of one forward pass on each data rank."""

    accumulation: int = 1
    """Micro-batches of one optimizer step on each data rank."""

    balance: bool = False
    """True divides a step's samples over ranks and micro-batches by what each costs in that step,
    so that ranks have about equally much to do; false divides them in order. The samples are the
    same."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of weights and activations; bf16 keeps fp32 master weights."""

    seed: int = 0
    """Seed of sample order, new weights and dropout."""

    eval_every: int = 0
    """Number of steps between evaluations; 0 evaluates at the end only."""

    save_every: int = 0
    """Number of steps between checkpoints; 0 writes one at the end only."""

    keep_checkpoints: int | None = 2
    """Number of newest checkpoints that stay on disk; null keeps all."""

    deepspeed: Path | dict[str, Any] | None = None
    """The user's own DeepSpeed configuration, a JSON file or its content; null is ZeRO stage 0."""

    resume: Literal[False, True, "auto"] = False
    """True resumes from the newest checkpoint in `out`; auto resumes if there is one and starts a
    new run otherwise, which suits a job that may go back into the queue."""

    grace_seconds: int | None = None
    """After SIGTERM or SIGUSR1 a run ends its step, saves and exits with code 75; if that takes
    more than this many seconds, it exits at once with code 143; null sets no limit."""

    hang_seconds: int | None = 120
    """Seconds without a sign of life after which a rank counts as lost, and the others end; null
    waits as long as the collectives do."""

    log_every: int = 10
    """Number of steps between updates of the figures beside the progress bar."""

    plan_only: bool = False
    """True walks one epoch without a model and prints what would be kept."""

    def __post_init__(self) -> None:
        for key in ("epochs", "micro_batch", "accumulation", "log_every"):
            require(self, key, getattr(self, key) >= 1, "must be at least 1")
        for key in ("seed", "eval_every", "save_every"):
            require(self, key, getattr(self, key) >= 0, "must be 0 or more")
        for key in ("steps", "keep_checkpoints", "grace_seconds", "hang_seconds"):
            value = getattr(self, key)
            require(self, key, value is None or value >= 1, "must be at least 1, or null")
