"""The settings of a student."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from regate_ds.settings.refuse import require


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the text backbone (peft); everything else is frozen."""

    rank: int = 16
    """Rank of the update of each adapted matrix."""

    alpha: float = 32.0
    """Scale of the update, which is multiplied by alpha / rank."""

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

    kind: Literal["llava", "qwen2_vl", "internvl"] = "llava"
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
    """Low-rank adapters to train (see `model.lora.*`); null trains all weights."""

    freeze_vision: bool = False
    """True leaves the vision tower as it is and trains projector and decoder."""

    gradient_checkpointing: bool = False
    """True recomputes the decoder's layers in the backward pass; false stores their activations."""

    def __post_init__(self) -> None:
        for key in ("text", "vision", "tokenizer"):
            is_set, is_fresh = bool(getattr(self, key)), self.path is None
            require(self, key, is_fresh or not is_set, "conflicts with model.path; leave one out")
            require(self, key, is_set or not is_fresh, "is needed without model.path; set one")
