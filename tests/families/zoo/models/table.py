"""All families of the zoo, by name."""

from __future__ import annotations

from functools import partial

from transformers.models.auto import modeling_auto

from tests.families.zoo.models.family import Family
from tests.families.zoo.models.grids import GRIDS
from tests.families.zoo.models.left_out import LEFT_OUT
from tests.families.zoo.models.others import OTHERS
from tests.families.zoo.models.sizes import tiny_config
from tests.families.zoo.models.squares import SQUARES
from tests.families.zoo.models.texts import TEXTS, VARIANTS

MULTIMODAL = (*SQUARES, *GRIDS, *OTHERS)


def _text_families() -> list[Family]:
    """Return every class that transformers has for causal language models."""
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    seen = {one.config.args[0] for one in MULTIMODAL} | LEFT_OUT.keys()
    plain = {name: (name, {}) for name in names if name not in seen}
    return [
        Family(
            name=name,
            model_class=names[model_type],
            config=partial(tiny_config, model_type, **{**TEXTS.get(model_type, {}), **fields}),
        )
        for name, (model_type, fields) in {**plain, **VARIANTS}.items()
    ]


FAMILIES: dict[str, Family] = {one.name: one for one in (*MULTIMODAL, *_text_families())}
