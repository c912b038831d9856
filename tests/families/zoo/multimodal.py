"""The multimodal families: the tiny config of each, and how its images are made."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.families.zoo.family import Family
from tests.families.zoo.pixels import grids, mark_images, squares
from tests.families.zoo.sizes import VISION, shrink, tiny_config

MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}


def tower(model_type: str, **special: Any) -> dict[str, Any]:
    """Return the fields of a tiny vision tower."""
    return shrink(model_type, sizes=VISION, **special)


def _llava(decoder: str, **special: Any) -> Any:
    return tiny_config(
        "llava",
        vision_config=tower("clip_vision_model"),
        text_config=shrink(decoder, **special),
        vision_feature_layer=-1,
    )


def _qwen(model_type: str, **vision: Any) -> Any:
    kinds = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
    text = shrink(kinds[model_type], rope_parameters=MROPE)
    small = tower(f"{model_type}_vision", patch_size=4, **vision)
    return tiny_config(model_type, text_config=text, vision_config=small)


LLAVAS = tuple(
    Family(
        name=f"llava over {decoder}",
        model_class="LlavaForConditionalGeneration",
        config=partial(_llava, decoder, **special),
        make_images=squares,
    )
    for decoder, special in (("llama", {}), ("qwen2", {}), ("mistral", {"sliding_window": None}))
)

QWENS = (
    Family(
        name="qwen2_vl",
        model_class="Qwen2VLForConditionalGeneration",
        config=partial(_qwen, "qwen2_vl", hidden_size=64),
        make_images=grids,
        extra_inputs=mark_images,
        settings={"position_axes": 3},
    ),
    Family(
        name="qwen2_5_vl",
        model_class="Qwen2_5_VLForConditionalGeneration",
        config=partial(_qwen, "qwen2_5_vl", window_size=16, fullatt_block_indexes=[1]),
        make_images=grids,
        extra_inputs=mark_images,
        settings={"position_axes": 3},
    ),
)

MULTIMODAL = (*LLAVAS, *QWENS)
