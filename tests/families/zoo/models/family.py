"""What the zoo knows of one family: how to make its tiny config, and its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.models.llama4 import modeling_llama4

from tests.families.zoo.models.weights import draw_weights

MakeImages = Callable[[Any, torch.Generator, int], dict[str, Any]]
"""(host, generator, number of images) -> the images' inputs, as the host's forward takes them."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One class of transformers over one decoder."""

    name: str
    model_class: str
    config: Callable[[], Any]
    """Makes the tiny config."""

    make_images: MakeImages | None = None
    """Makes images; None for a model of text."""

    count_tokens: Callable[[Any, dict[str, Any]], list[int]] | None = None
    """(host, the images' inputs) -> tokens of each image; None asks ``get_image_features``."""

    extra_inputs: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]] | None = None
    """(numbers of images [B, T], answers [B, T], numbers of samples [B, T]) -> inputs that tell the
    host of each position."""

    settings: dict[str, Any] = field(default_factory=dict)
    """How the micro-batches of this family differ; see ``cases.py``."""


def attentions_of(family: Family) -> tuple[str, ...]:
    """Return the attention implementations that the class has, of those that run on a CPU."""
    classes = [getattr(transformers, family.model_class)]
    decoder = type(family.config().get_text_config(decoder=True))
    classes += [MODEL_MAPPING[decoder]] if decoder in MODEL_MAPPING else []
    has_sdpa = all(getattr(one, "_supports_sdpa", True) for one in classes)
    return ("sdpa", "eager") if has_sdpa else ("eager",)


def _mend_llama4() -> None:
    """Give Llama 4's text output the field that its multimodal model reads.

    Without it transformers 5.24 cannot run Llama4ForConditionalGeneration at all.
    """
    output = modeling_llama4.MoeCausalLMOutputWithPast
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def build(family: Family, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """Return the family's tiny model in fp64, in training mode, with large random weights.

    Call it within ``in_fp64``.
    """
    _mend_llama4()
    config = family.config()
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # the others do not know fp64
    torch.manual_seed(seed)
    model = getattr(transformers, family.model_class)(config).double()
    draw_weights(model, seed)
    return model.train()
