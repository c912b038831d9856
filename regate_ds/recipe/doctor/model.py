"""`regate doctor --model DIR`: what a checkpoint's configuration says, before a weight is read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from regate_ds.adapters.huggingface.support import require_known_config
from regate_ds.data.chat.video_text import lack_of_videos
from regate_ds.families.hosts import Supported, supported_as
from regate_ds.families.table import ALL_STUDENTS, FAMILIES
from regate_ds.recipe.doctor.check import Check
from regate_ds.recipe.students.processor import chat_encoder, load_processor, names_a_template
from regate_ds.teacher.loading import refuse_adapters

_SLOW_CONV3D = "2.9."
"""Versions of torch whose Conv3d makes some towers 10 to 20 times slower."""

_BY_CONV3D = (
    *("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl", "qwen3_vl_moe"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "exaone4_5"),
    *("glm4v", "glm46v", "glm4v_moe", "glm_ocr"),
)
"""Families whose patches are embedded by a Conv3d."""


def examine_model(folder: Path) -> list[Check]:
    """Check whether elision knows the model in a folder, and what its runs must look like.

    ValueError if the folder has no readable configuration.
    """
    refuse_adapters(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder of a checkpoint")
    try:
        # Code that lies beside a checkpoint is not run, and nothing is downloaded.
        config: Any = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, StrictDataclassError, ValueError, KeyError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{folder} has no config.json that can be read ({cause})") from error
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    text = config.get_text_config(decoder=True)
    try:
        support = supported_as(name, text)
        require_known_config(support, text)
    except ValueError as error:
        return [Check("model", name, True, False, str(error))]
    return [
        Check("model", f"{name} over {text.model_type}", True, True),
        *_rows(name, support),
        *_images(config),
        *_recipe(folder, config),
        *_speed(config, support),
    ]


_PACKED = {
    "none": ("not possible", "does not keep the samples of a row apart"),
    "text": ("without images only", "misplaces the images of packed samples in its masks"),
}


def _rows(name: str, support: Supported) -> list[Check]:
    checks = []
    if support.recurrent:
        advice = "elide leaves tokens out of a recurrence, mlp_only does not (docs/algorithm.md)"
        checks.append(Check("recurrent layers", "two executions", False, True, advice))
    if support.packs != "any":
        found, fault = _PACKED[support.packs]
        advice = f"{name} {fault}: leave data.pack_length null"
        checks.append(Check("packed rows", found, False, False, advice))
    if support.own_mask:
        advice = "its own mask is needed: attn_implementation=sdpa or eager"
        checks.append(Check("flash_attention_2", "not possible", False, False, advice))
    return checks


def _images(config: Any) -> list[Check]:
    if getattr(config, "vision_config", None) is None:
        return []
    family = FAMILIES.get(config.model_type)
    checks = []
    if family is None:
        advice = "on several ranks put a sample with an image into every micro-batch"
        checks.append(Check("empty image", "not known", False, False, advice))
    if family is None or family.image_lengths is None:
        advice = "to elide image tokens, number the images in the collate function (docs/images.md)"
        checks.append(Check("image tokens", "not told apart", False, False, advice))
    return checks


def _recipe(folder: Path, config: Any) -> list[Check]:
    if config.model_type not in ALL_STUDENTS:
        students = ", ".join(ALL_STUDENTS)
        advice = f"it trains {students}; attach() takes this one in a loop of your own"
        return [Check("regate train", "not possible", False, False, advice)]
    return _chat_template(folder, config) if names_a_template(folder) else []


def _chat_template(folder: Path, config: Any) -> list[Check]:
    """Load the folder's processor, and write a sample by it."""
    try:
        processor = load_processor(folder, config.model_type)
        patch = processor.tokenizer.convert_ids_to_tokens(config.image_token_id)
        chat_encoder(processor, patch, max_length=1)
    except (OSError, ValueError) as error:
        return [Check("chat template", "not usable", False, False, " ".join(str(error).split()))]
    name, lack = type(processor).__name__, lack_of_videos(processor)
    checks = [Check("chat template", f"that of its {name}", False, True)]
    if lack is not None:
        checks.append(Check("videos", "not possible", False, False, f"{lack}; or give frames"))
    return checks


def _speed(config: Any, support: Supported) -> list[Check]:
    checks = []
    if config.model_type in _BY_CONV3D and torch.__version__.startswith(_SLOW_CONV3D):
        advice = "its Conv3d slows the tower 10 to 20 times (pytorch#166122): use 2.10 or later"
        checks.append(Check("torch", torch.__version__, False, False, advice))
    if "linear_attention" in support.recurrent and importlib.util.find_spec("fla") is None:
        advice = "optional; without it linear layers are slow: pip install flash-linear-attention"
        checks.append(Check("fla", "absent", False, False, advice))
    return checks
