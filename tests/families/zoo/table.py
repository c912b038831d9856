"""All families of the zoo, by name."""

from __future__ import annotations

from functools import partial

from transformers.models.auto import modeling_auto

from tests.families.zoo.family import Family
from tests.families.zoo.multimodal import MULTIMODAL
from tests.families.zoo.sizes import tiny_config
from tests.families.zoo.texts import TEXTS


def _text_families() -> list[Family]:
    """Return every class that transformers has for causal language models."""
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [
        Family(
            name=model_type,
            model_class=model_class,
            config=partial(tiny_config, model_type, **TEXTS.get(model_type, {})),
        )
        for model_type, model_class in names.items()
    ]


FAMILIES: dict[str, Family] = {one.name: one for one in (*MULTIMODAL, *_text_families())}
