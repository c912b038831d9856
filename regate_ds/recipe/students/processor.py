"""Load a model's own processor, with its chat template, from the model's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from transformers.utils import is_torchvision_available
from transformers.utils.chat_template_utils import _compile_jinja_template

from regate_ds.data.chat.encode import ChatEncoder
from regate_ds.data.chat.image_text import ImageText
from regate_ds.data.chat.messages import Messages
from regate_ds.data.chat.render import ChatTemplate
from regate_ds.data.chat.source import dated, default_of
from regate_ds.data.tokens import special_tokens
from regate_ds.families.family import transformers_class
from regate_ds.families.table import PROCESSORS, STUDENTS
from regate_ds.teacher.loading import read_files

_CONFIGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def names_a_template(folder: Path) -> bool:
    """Return whether a model's folder names its processor, and has a chat template."""
    if named_processor(folder) is None:
        return False
    is_own = any((folder / name).is_file() for name in _TEMPLATES)
    return is_own or any(_read(folder / name).get("chat_template") for name in _CONFIGS)


def load_processor(folder: Path, model_type: str) -> Any:
    """Load the processor of a folder that has a chat template.

    ValueError if no test has shown that its samples are written here as it writes them.
    """
    name = named_processor(folder)
    if name is None or name != PROCESSORS.get(model_type):
        raise ValueError(
            f"{folder} has the chat template of a {name} over a {model_type} model, which samples "
            "are not written by yet; use another model (docs/chat_templates.md), or set "
            f"data.template ({', '.join(STUDENTS)} alone)"
        )
    try:
        processor = read_files(images_alone(transformers_class(name)), folder)
    except ImportError as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"the {name} in {folder} lacks a package ({cause}); install it") from error
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    if not hasattr(processor, "video_processor") and (videos := _video_settings(folder)):
        # It is not used here, but the trained model's folder has to have it.
        processor.video_processor = videos
    _require_usable(folder, processor)
    return processor


def _video_settings(folder: Path) -> dict[str, Any]:
    own = _read(folder / "processor_config.json").get("video_processor")
    return own or _read(folder / "video_preprocessor_config.json")


def _require_usable(folder: Path, processor: Any) -> None:
    """Refuse a slow tokenizer, one without padding, and one whose settings cut samples without a
    word."""
    if getattr(processor.tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"the {type(processor.tokenizer).__name__} in {folder} is a slow tokenizer, which does "
            "not give the characters of its tokens; put a tokenizer.json into the folder"
        )
    if processor.tokenizer.pad_token is None:
        raise ValueError(
            f"the {type(processor.tokenizer).__name__} in {folder} has no pad token, by which the "
            "processor pads samples with images; set pad_token in its tokenizer_config.json"
        )
    given = {**getattr(processor, "text_kwargs", {}), **processor.tokenizer.init_kwargs}
    if given.get("truncation") not in (None, False, "do_not_truncate"):
        raise ValueError(
            f"the processor in {folder} has truncation={given['truncation']!r}, which cuts samples "
            "without a word; take it out of its tokenizer_config.json, and set data.max_length"
        )


def named_processor(folder: Path) -> str | None:
    """Return the class of processor that a model's folder names."""
    found = (_read(folder / name).get("processor_class") for name in _CONFIGS)
    return next((name for name in found if name), None)


@cache
def images_alone(processor_class: Any) -> Any:
    """Return the class of processor; where torchvision, which reads videos, is missing, without
    its part for videos."""
    name = processor_class.__name__
    if is_torchvision_available() or "video_processor" not in processor_class.get_attributes():
        return processor_class
    needs = signature(processor_class).parameters["video_processor"].default is Parameter.empty
    *attributes, last = processor_class.get_attributes()
    # Classes hand their parts on by place, so that only the last one can be missing.
    if needs or last != "video_processor":
        raise ImportError(f"{name} requires torchvision, also where no video is read")
    return type(
        name,
        (processor_class,),
        {
            "get_attributes": classmethod(lambda _: list(attributes)),
            # A class that is made here has no name that a worker could load it by.
            "__reduce__": lambda self: (_rebuilt, (name, vars(self))),
        },
    )


def _rebuilt(name: str, state: dict[str, Any]) -> Any:
    processor_class = images_alone(transformers_class(name))
    made = processor_class.__new__(processor_class)
    vars(made).update(state)
    return made


def chat_encoder(
    processor: Any, patch: str, *, max_length: int, video_frames: int | None = None
) -> ChatEncoder:
    """Return what writes records as a processor does.

    patch: the token that the model puts an image's features in the place of. video_frames: as in
    ``ImageText``. ValueError if the template cannot be used for training.
    """
    source = default_of(processor.chat_template, "the processor")
    images = ImageText(processor, patch, video_frames)
    special = special_tokens(processor.tokenizer, images.placeholder, patch)
    apply = partial(_apply, processor.tokenizer, dated(source))
    return ChatEncoder(
        processor.tokenizer,
        template=ChatTemplate(source, apply, special),
        images=images,
        max_length=max_length,
    )


def _apply(
    tokenizer: Any, source: str, said: Sequence[Messages], asks: bool, tools: str | None
) -> list[str]:
    """Render conversations as ``apply_chat_template`` does, which also looks for files in them, and
    copies them anew for each text."""
    template, named = _compile_jinja_template(source), tokenizer.special_tokens_map
    offered = None if tools is None else json.loads(tools)
    return [
        template.render(
            messages=one, tools=offered, documents=None, add_generation_prompt=asks, **named
        )
        for one in said
    ]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); copy it again"
        ) from error
