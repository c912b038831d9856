"""Load a model's own processor, with its chat template, from the model's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import is_torchvision_available

from regate_ds.data.chat.encode import ChatEncoder
from regate_ds.data.chat.image_text import ImageText
from regate_ds.data.chat.messages import Messages
from regate_ds.data.chat.render import ChatTemplate, dated
from regate_ds.data.tokens import special_tokens
from regate_ds.families.family import Family, transformers_class

_CONFIGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def has_chat_template(folder: Path) -> bool:
    """Return whether a model's folder has a chat template, of its processor or its tokenizer."""
    if any((folder / name).is_file() for name in _TEMPLATES):
        return True
    return any("chat_template" in _read(folder / name) for name in _CONFIGS)


def load_processor(folder: Path, family: Family) -> Any:
    """Load the processor of a folder that has a chat template.

    ValueError if no test has proven that its samples can be written here as it writes them, or if
    it has no chat template.
    """
    name = named_processor(folder) or family.processor
    if family.processor is None or name != family.processor:
        raise ValueError(
            f"{folder} has a chat template, and samples of a {family.model_type} model are not yet "
            f"written by its {name or 'processor'} (docs/chat_templates.md); set data.template to "
            "write them by the package's own template"
        )
    load = images_alone(transformers_class(name)).from_pretrained
    processor = load(folder, local_files_only=True)
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def named_processor(folder: Path) -> str | None:
    """Return the class of processor that a model's folder names."""
    found = (_read(folder / name).get("processor_class") for name in _CONFIGS)
    return next((name for name in found if name), None)


def images_alone(processor_class: Any) -> Any:
    """Return the class of processor; where torchvision, which reads videos, is missing, without
    its part for videos."""
    if is_torchvision_available() or "video_processor" not in processor_class.get_attributes():
        return processor_class
    attributes = [name for name in processor_class.get_attributes() if name != "video_processor"]
    made = type(processor_class.__name__, (processor_class,), {})
    made.get_attributes = classmethod(lambda _: list(attributes))
    made.__module__ = __name__
    return made


def chat_encoder(processor: Any, patch: str, *, max_length: int) -> ChatEncoder:
    """Return what writes records as a processor does.

    patch: the token that the model puts an image's features in the place of. ValueError if the
    template cannot be used for training.
    """
    source = processor.chat_template
    source = source["default"] if isinstance(source, dict) else source
    images = ImageText(processor, patch)
    special = special_tokens(processor.tokenizer, images.placeholder, patch)
    apply = partial(_apply, processor, dated(source))
    return ChatEncoder(
        processor.tokenizer,
        template=ChatTemplate(source, apply, special),
        images=images,
        max_length=max_length,
    )


def _apply(processor: Any, source: str, conversations: Sequence[Messages], asks: bool) -> list[str]:
    return processor.apply_chat_template(
        list(conversations), chat_template=source, add_generation_prompt=asks, tokenize=False
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
