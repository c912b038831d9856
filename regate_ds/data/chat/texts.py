"""The chat template of a tokenizer that has no processor: contents are texts."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from regate_ds.data.chat.messages import Messages
from regate_ds.data.chat.render import ChatTemplate
from regate_ds.data.chat.source import dated, default_of
from regate_ds.data.tokens import special_tokens

IMAGE = "\ufdd1"
"""Stands for an image in a template of texts. Unicode keeps this code out of texts."""


def template_of_texts(tokenizer: Any) -> ChatTemplate:
    """Return a tokenizer's own chat template. ValueError if it cannot be used for training."""
    source = default_of(tokenizer.chat_template, "the tokenizer")
    apply = partial(_apply, tokenizer, dated(source))
    return ChatTemplate(source, apply, special_tokens(tokenizer), placeholder=IMAGE)


def _apply(
    tokenizer: Any, source: str, said: list[Messages], asks: bool, tools: str | None
) -> list[str]:
    return tokenizer.apply_chat_template(
        said,
        chat_template=source,
        add_generation_prompt=asks,
        tokenize=False,
        tools=None if tools is None else json.loads(tools),
    )


def eos_of(tokenizer: Any) -> str:
    """Return the token that ends a text. ValueError if the tokenizer has none."""
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the {type(tokenizer).__name__} has neither a chat template nor an eos token, which "
            "must end each answer; set its eos_token"
        )
    return tokenizer.eos_token
