"""All families of the zoo, by name."""

from __future__ import annotations

from functools import partial

from transformers.models.auto import modeling_auto

from tests.families.zoo.family import Family
from tests.families.zoo.grids import GRIDS
from tests.families.zoo.left_out import LEFT_OUT
from tests.families.zoo.others import OTHERS
from tests.families.zoo.sizes import tiny_config
from tests.families.zoo.squares import SQUARES
from tests.families.zoo.texts import TEXTS

MULTIMODAL = (*SQUARES, *GRIDS, *OTHERS)


def _text_families() -> list[Family]:
    """Return every class that transformers has for causal language models."""
    seen = {one.config.args[0] for one in MULTIMODAL} | LEFT_OUT.keys()
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [
        Family(
            name=model_type,
            model_class=model_class,
            config=partial(tiny_config, model_type, **TEXTS.get(model_type, {})),
        )
        for model_type, model_class in names.items()
        if model_type not in seen
    ]


FAMILIES: dict[str, Family] = {one.name: one for one in (*MULTIMODAL, *_text_families())}
