"""The record of a model family: where its parts lie, and which of its inputs are special.

A record holds the names of transformers' classes, which are loaded only when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from regate_ds.data.interfaces import VisionInputs

ImageLengths = Callable[[Any, Mapping[str, Any]], Mapping[int, Sequence[int]]]
"""Returns for each id of a placeholder how many of them each image of a micro-batch has, in reading
order, given the model's config and its inputs. ValueError if the inputs do not tell it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of multimodal models in transformers."""

    model_type: str
    """``model_type`` in the model's config."""

    model_class: str
    """Name of the model's class in transformers, with decoder and head."""

    tower: str
    """Attribute of the base model that holds the vision tower, with dots where it lies deeper."""

    embedder: str | None = None
    """Module of the base model that puts images into the embeddings, where the base model has no
    ``get_image_features``; its ``image_embed`` then takes the empty image."""

    decoder: str = "language_model"
    """Attribute of the base model that holds the text decoder; its weights' names begin with it."""

    plain_text: str | None = None
    """``model_type`` of the causal language model that equals the decoder on text alone; None if
    the decoder's own config is that of such a model."""

    num_position_axes: int = 1
    """Number of rotary axes: 3 where images have a time, a height and a width."""

    empty_image: Callable[[Any, Tensor], dict[str, Tensor]]
    """Makes the inputs of ``get_image_features`` for the smallest image, from the model's config
    and a tensor whose dtype and device they get."""

    empty_video: Callable[[Any, Tensor], dict[str, Tensor]] | None = None
    """Makes those of ``get_video_features`` where videos reach other weights than images; None
    where they reach the same, or the model takes no videos."""

    runs_by_image: bool = False
    """Whether some of its modules run once for each image: under ZeRO-3 ranks with different
    numbers of images would then make different calls."""

    image_lengths: ImageLengths | None = None
    """Tells the images of a user's micro-batch apart; None if image tokens cannot be elided unless
    the batch numbers its images itself."""

    image_inputs: tuple[str, ...] = ("pixel_values",)
    """Names of the model inputs that hold images, image by image."""

    patches: Callable[[Any, dict[str, Tensor], Sequence[int]], list[Tensor]] | None = None
    """Returns the pixel values [n, P] of each image token's patch, from the model's config, its
    image inputs and the number of tokens of each image. None if images cannot be ranked by them."""

    attention: Callable[[Any, dict[str, Tensor], Tensor], list[Tensor]] | None = None
    """Returns the attention [L, n] that each image token receives, from the model's config, its
    image inputs and what the tower's positions receive [L, B, S]. None if images cannot be ranked
    by it."""

    vision_inputs: Callable[[Any, Any], VisionInputs] | None = None
    """Makes the family's ``VisionInputs`` from the model's config and its image processor; None if
    the recipe cannot train it. ValueError for a processor of another family."""

    in_megatron: bool = False
    """Whether `regate train` can put the vision tower before a decoder of Megatron-core."""

    def load_class(self) -> Any:
        """Return the model's class in transformers."""
        return transformers_class(self.model_class)

    def tower_of(self, model: Any) -> nn.Module:
        """Return the vision tower of a model with a head."""
        return model.model.get_submodule(self.tower)

    def decoder_of(self, model: Any) -> nn.Module:
        """Return the text decoder of a model with a head."""
        return getattr(model.model, self.decoder)


def transformers_class(name: str) -> Any:
    """Return a class of transformers by its name; this imports transformers."""
    return getattr(import_module("transformers"), name)
