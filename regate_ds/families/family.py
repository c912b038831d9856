"""The record of a model family: where its parts lie, and what of its inputs is special.

Classes of transformers are named, and loaded when they are asked for: reading a record needs torch
only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from regate_ds.data.llava.encode import VisionInputs


@dataclass(frozen=True, kw_only=True)
class Family:
    """A multimodal model of transformers, by its config's ``model_type``."""

    model_type: str

    model_class: str
    """Its class in transformers, decoder and head included."""

    tower: str
    """Attribute of the base model: what turns pixels into features."""

    decoder: str = "language_model"
    """Attribute of the base model: the text decoder. Names of its weights begin so."""

    plain_text: str | None = None
    """``model_type`` of the causal language model that the decoder is on text alone; None if its
    own config names one."""

    num_position_axes: int = 1
    """Rotary axes: 3 where images have a time, a height and a width."""

    empty_image: Callable[[Any, Tensor], dict[str, Tensor]]
    """Model inputs of the smallest image, by the vision config; in dtype and device of a tensor."""

    vision_inputs: Callable[[Any, Any], VisionInputs] | None = None
    """How images become inputs, by the model's config and its image processor; None if the recipe
    does not know it. ValueError for a processor of another family."""

    in_megatron: bool = False
    """Whether `regate train` can put it before a decoder of Megatron-core."""

    @property
    def packs(self) -> bool:
        """Whether a row may hold several samples: only plain positions can restart in a row."""
        return self.num_position_axes == 1

    def load_class(self) -> Any:
        return transformers_class(self.model_class)

    def tower_of(self, model: Any) -> nn.Module:
        """The vision tower of a model with a head."""
        return getattr(model.model, self.tower)

    def decoder_of(self, model: Any) -> nn.Module:
        """The text decoder of a model with a head."""
        return getattr(model.model, self.decoder)


def transformers_class(name: str) -> Any:
    """A class of transformers, which is imported now if it was not before."""
    return getattr(import_module("transformers"), name)
