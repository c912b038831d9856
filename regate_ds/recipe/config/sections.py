"""The parts of a run's configuration, their meaning, and what each refuses.

Paths are taken from the folder the command runs in. A check that needs several parts at once is in
configuration.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from regate_ds.config import RegateConfig
from regate_ds.data.llava.template import Template
from regate_ds.session import schedule_of


def require(section: object, key: str, holds: bool, problem: str) -> None:
    """Refuse the value of ``section.key``, naming it, unless ``holds``."""
    if not holds:
        raise ValueError(f"{key}={getattr(section, key)!r}: {problem}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the text backbone (peft); everything else is frozen."""

    rank: int = 16
    """Rank of the update of each adapted matrix."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank."""

    dropout: float = 0.0
    """Share of the adapter's inputs that is zeroed in training."""

    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Last part of the names of the linear layers that get an adapter."""

    def __post_init__(self) -> None:
        require(self, "rank", self.rank >= 1, "must be at least 1")
        require(self, "alpha", self.alpha > 0, "must be above 0")
        require(self, "dropout", 0 <= self.dropout < 1, "must be in [0, 1)")
        require(self, "target_modules", len(self.target_modules) > 0, "must name a module")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student: a Hugging Face multimodal model, from a directory or made from a config."""

    path: Path | None = None
    """Directory of a student (weights, tokenizer, image processor); null makes a fresh one."""

    kind: Literal["llava", "qwen2_vl"] = "llava"
    """Architecture of a fresh student; a directory names its own."""

    text: dict[str, Any] = field(default_factory=dict[str, Any])
    """Hugging Face config of a fresh student's decoder, with its `model_type`."""

    vision: dict[str, Any] = field(default_factory=dict[str, Any])
    """Hugging Face config of a fresh student's vision tower, with its `model_type`."""

    tokenizer: Path | None = None
    """Directory of a fresh student's tokenizer."""

    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """How the decoder computes attention."""

    lora: LoraConfig | None = None
    """Train low-rank adapters (see `model.lora.*`); null trains all weights."""

    freeze_vision: bool = False
    """Leave the vision tower as it is; projector and decoder are trained."""

    gradient_checkpointing: bool = False
    """Recompute the decoder's layers in the backward pass instead of storing their activations."""

    def __post_init__(self) -> None:
        for key in ("text", "vision", "tokenizer"):
            given = bool(getattr(self, key))
            require(self, key, not given or self.path is None, "goes with path=null only")
            require(self, key, given or self.path is not None, "is needed where path is null")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Samples in LLaVA's JSON format."""

    train: Path
    """JSON file of the training samples."""

    test: Path | None = None
    """JSON file of the held-out samples; null trains without evaluation."""

    image_root: Path | None = None
    """Folder that the image paths start from; null is the folder of each JSON file."""

    name: str = "train"
    """Name of the training set in the sample keys; the reference store is bound to it."""

    max_length: int = 2048
    """Longer samples are cut to this many tokens, image tokens included."""

    template: Template = field(default_factory=Template)
    """Text around the turns of a conversation (see `data.template.*`)."""

    skip_bad: bool = False
    """True counts and reports broken records; false stops at the first one."""

    pack_length: int | None = None
    """Put several samples into one row of at most this many tokens; null is one sample a row."""

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
        require(self, "num_workers", self.num_workers >= 0, "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen text-only reference, scored once before training, or along with it."""

    path: Path | None = None
    """Directory or GGUF file of a causal language model; null is the student's text backbone."""

    tokenizer: Literal["same", "own"] = "same"
    """Of a teacher at `path`: the student's, or refused; `own` aligns losses by characters."""

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
        fits = self.tokenizer == "same" or self.path is not None
        require(self, "tokenizer", fits, "needs a teacher of its own: name one in teacher.path")


@dataclass(frozen=True, kw_only=True)
class ElisionConfig(RegateConfig):
    """The knobs of the method, as in a YAML file: total_steps may be left to the runner."""

    total_steps: int | None = None
    """Optimizer steps over which the schedule runs; null is the number of steps of the run."""

    def __post_init__(self) -> None:
        # Judge the other knobs now: before the data is read, the run's length is not known.
        self.knobs(num_steps=1_000_000_000)

    def knobs(self, num_steps: int) -> RegateConfig:
        """The method's configuration in a run of ``num_steps`` optimizer steps."""
        own = {f.name: getattr(self, f.name) for f in fields(RegateConfig)}
        if self.total_steps is None:
            own["total_steps"] = num_steps
        return RegateConfig(**own)

    def judge_length(self, num_steps: int) -> None:
        """ValueError if the schedule is too short for the run, or leaves no step to elide in."""
        knobs = self.knobs(num_steps)
        if not self.enabled:
            return
        if knobs.total_steps < num_steps:
            raise ValueError(
                f"elision.total_steps={self.total_steps}: the run has {num_steps} steps; set it to "
                "at least as many, or to null"
            )
        schedule = schedule_of(knobs)
        if self.keep_share < 1.0 and all(schedule.is_dense(step) for step in range(num_steps)):
            raise ValueError(
                f"elision.keep_share={self.keep_share}, but no step of the run's {num_steps} is "
                f"sparse: lower elision.warmup={self.warmup}, elision.final_dense_share="
                f"{self.final_dense_share} or elision.cycle_dense_steps={self.cycle_dense_steps}, "
                "or set elision.keep_share=1.0"
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """A run through Megatron-core; what is left of the job's ranks are data ranks."""

    tensor: int = 1
    """Ranks that share each layer's matrices."""

    pipeline: int = 1
    """Stages of the decoder, each on ranks of its own."""

    context: int = 1
    """Ranks that share each sample's positions (needs Transformer Engine)."""

    virtual: int = 1
    """Parts of the decoder on each stage; above 1 the schedule interleaves them."""

    sequence: bool = False
    """True cuts activations between the matrices over the tensor ranks."""

    distributed_optimizer: bool = False
    """True cuts the optimizer's state over the data ranks."""

    layout: Literal["constant", "ragged"] = "constant"
    """Kept tokens in rows of one length, or one after the other (`ragged`; needs Transformer
    Engine)."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing, attention, or whole layers."""

    def __post_init__(self) -> None:
        for key in ("tensor", "pipeline", "context", "virtual"):
            require(self, key, getattr(self, key) >= 1, "must be at least 1")
        stages, tensor = self.pipeline > 1, self.tensor > 1
        require(self, "virtual", self.virtual == 1 or stages, "needs parallel.pipeline above 1")
        require(self, "sequence", not self.sequence or tensor, "needs parallel.tensor above 1")

    @property
    def ranks_per_copy(self) -> int:
        """Ranks that read the same samples."""
        return self.tensor * self.pipeline * self.context

    @property
    def weight_parts(self) -> int:
        """Ranks that the weights of one copy of the model are cut over."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up."""

    lr: float = 2e-5
    """Highest learning rate."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases, norms and other vectors have none."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""

    eps: float = 1e-8
    """Added to the root of the second mean."""

    warmup_steps: float = 0.03
    """Steps of linear warm-up: a count, or a share of the run's steps below 1."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""

    min_lr_share: float = 0.0
    """Share of `lr` that a cosine ends at."""

    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; null does not clip."""

    def __post_init__(self) -> None:
        require(self, "lr", self.lr > 0, "must be above 0")
        require(self, "weight_decay", self.weight_decay >= 0, "must be 0 or more")
        require(self, "betas", all(0 <= b < 1 for b in self.betas), "must be in [0, 1)")
        require(self, "eps", self.eps > 0, "must be above 0")
        require(self, "warmup_steps", self.warmup_steps >= 0, "must be 0 or more")
        whole = self.warmup_steps < 1 or float(self.warmup_steps).is_integer()
        require(self, "warmup_steps", whole, "must be a whole number, or a share below 1")
        require(self, "min_lr_share", 0 <= self.min_lr_share <= 1, "must be in [0, 1]")
        clips = self.grad_clip is None or self.grad_clip > 0
        require(self, "grad_clip", clips, "must be above 0; null does not clip")


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """How long, how fast, how exact, and where the results go."""

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

    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of weights and activations; bf16 keeps fp32 master weights."""

    seed: int = 0
    """Seed of sample order, new weights and dropout."""

    eval_every: int = 0
    """Evaluate after every so many steps; 0 evaluates at the end only."""

    save_every: int = 0
    """Write a checkpoint after every so many steps; 0 writes one at the end only."""

    keep_checkpoints: int | None = 2
    """Number of newest checkpoints that stay on disk; null keeps all."""

    deepspeed: Path | dict[str, Any] | None = None
    """The user's own DeepSpeed configuration, a JSON file or its content; null is ZeRO stage 0."""

    resume: Literal[False, True, "auto"] = False
    """True goes on from the newest checkpoint in `out`; auto does so if there is one, and starts
    the run otherwise, as a job needs that may be put back into the queue."""

    grace_seconds: int | None = None
    """After SIGTERM or SIGUSR1 a run ends its step, saves and exits with code 75; if that takes
    more than so many seconds it exits at once with 143; null lets it take its time."""

    log_every: int = 10
    """Refresh the figures beside the progress bar after every so many steps."""

    plan_only: bool = False
    """True walks one epoch without a model and prints what would be kept."""

    def __post_init__(self) -> None:
        for key in ("epochs", "micro_batch", "accumulation", "log_every"):
            require(self, key, getattr(self, key) >= 1, "must be at least 1")
        for key in ("seed", "eval_every", "save_every"):
            require(self, key, getattr(self, key) >= 0, "must be 0 or more")
        for key in ("steps", "keep_checkpoints", "grace_seconds"):
            value = getattr(self, key)
            require(self, key, value is None or value >= 1, "must be at least 1, or null")
