"""How a multimodal family is written down, and its tiny config made of its own parts."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.families.zoo.models.family import Family, MakeImages
from tests.families.zoo.models.sizes import VISION, shrink, tiny_config
from tests.families.zoo.models.texts import TEXTS

Fields = dict[str, Any]


def family(
    name: str,
    model_class: str,
    make_images: MakeImages | None = None,
    more: Fields | None = None,
    **fields: Any,
) -> Family:
    """Return a record.

    name: the ``model_type``, then perhaps "over" and a decoder's, and a comma and a remark.
    model_class: its name, of which ``ForConditionalGeneration`` may be left out.
    more: further fields of the record; all others are of the config.
    """
    types = name.partition(",")[0]
    model_type, _, decoder = types.partition(" over ")
    config = partial(tiny_multimodal, model_type, decoder=decoder or None, **fields)
    full = model_class if "For" in model_class else f"{model_class}ForConditionalGeneration"
    return Family(
        name=name, model_class=full, config=config, make_images=make_images, **(more or {})
    )


def tiny_multimodal(
    model_type: str,
    *,
    decoder: str | None = None,
    text: Fields | None = None,
    vision: Fields | None = None,
    **top: Any,
) -> Any:
    """Return a tiny config.

    decoder: the ``model_type`` of another decoder than the family's default.
    text, vision: fields of the inner configs; top: those of the outer one.
    """
    fields = shrink(model_type)
    inner = shrink(decoder) if decoder else fields.get("text_config")
    if inner is not None:
        top["text_config"] = {**inner, **TEXTS.get(inner["model_type"], {}), **(text or {})}
    if "vision_config" in fields:
        top["vision_config"] = {**fields["vision_config"], **(vision or {})}
    return tiny_config(model_type, **top)


def tower(model_type: str, **special: Any) -> Fields:
    """Return the fields of a tiny vision tower, for a family that has none by default."""
    return shrink(model_type, sizes=VISION, **special)
