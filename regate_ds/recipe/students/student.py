"""The student: a multimodal model with its tokenizer and image processor, in one folder.

Its family's record (``families/``) says how images become inputs. ``load.py`` loads it from a
folder or makes it from two dicts; ``trainable.py`` says which parts of it are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from regate_ds.data.chat.vision import ProcessorVision
from regate_ds.data.interfaces import VisionInputs


class StudentVision(VisionInputs, Protocol):
    """A family's vision inputs, on an image processor that is saved with the student."""

    @property
    def processor(self) -> Any: ...


@dataclass(frozen=True)
class Student:
    """A model, and what turns records into its inputs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vision: StudentVision

    @property
    def has_chat_template(self) -> bool:
        """Whether samples are written by the model's own chat template."""
        return isinstance(self.vision, ProcessorVision)

    @property
    def image_token(self) -> str:
        """The token that stands at each image position."""
        return str(self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id))

    @property
    def placeholder_ids(self) -> list[int]:
        """Ids of the tokens in the place of images and videos, which no teacher of texts sees."""
        config: Any = self.model.config
        ids = [config.image_token_id, getattr(config, "video_token_id", None)]
        return [one for one in ids if one is not None]

    @property
    def pad_id(self) -> int:
        """Id of padding; it is never seen, so eos stands in where the tokenizer has no pad."""
        tokenizer: Any = self.tokenizer
        pad_id = tokenizer.pad_token_id
        return tokenizer.eos_token_id if pad_id is None else pad_id


def save_student(student: Student, folder: Path) -> None:
    """Write config, weights (safetensors), tokenizer and image processor into ``folder``."""
    student.model.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    student.vision.processor.save_pretrained(folder)


def fresh_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int | None
) -> PreTrainedModel:
    """Make a model with weights from ``seed`` alone; None makes it on "meta", without weights.

    The caller's random state is left as it was.
    """
    if seed is None:
        with torch.device("meta"):
            return model_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of one token.

    Raises:
        ValueError: the tokenizer does not know it.
    """
    if token not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer has no token {token!r}; add it, or name another")
    return tokenizer.get_vocab()[token]


def require_size(name: str, given: Mapping[str, Any], key: str) -> None:
    """Refuse a wrong size among keys that transformers does not judge.

    Raises:
        ValueError: it is missing, or not a whole number above 0.
    """
    if key not in given:
        raise ValueError(f"{name}.{key} is missing; set it, because it has no default")
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}.{key}={value!r}: must be a whole number above 0")
