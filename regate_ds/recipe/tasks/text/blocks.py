"""Tokens of documents in rows of one length, by a tokenizer that is trained on them.

Shapes: N rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.recipe.tasks.text.documents import By, hold_out, read_documents


@dataclass(frozen=True, kw_only=True)
class TextBlocks:
    """A text as a language model reads it."""

    tokenizer: PreTrainedTokenizerFast
    """Trained on the training part alone."""

    train_NT: Tensor
    """int64: token ids; each document ends with the tokenizer's eos."""

    held_out_NT: Tensor
    """int64: the same of the documents that are held out."""


def open_text(
    path: Path, *, length: int, vocab_size: int, by: By = "line", held_out: float = 0.05
) -> TextBlocks:
    """Read a text file or folder; the same files give the same blocks everywhere.

    length: tokens of a row. by: what a document is (see ``read_documents``). held_out: the share of
    documents that nothing is trained on.

    ValueError as ``read_documents``, ``hold_out``, ``train_tokenizer`` and ``token_blocks``.
    """
    train, others = hold_out(read_documents(path, by=by), share=held_out)
    tokenizer = train_tokenizer(train, vocab_size=vocab_size)
    return TextBlocks(
        tokenizer=tokenizer,
        train_NT=token_blocks(train, tokenizer, length=length),
        held_out_NT=token_blocks(others, tokenizer, length=length),
    )


def token_blocks(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, *, length: int
) -> Tensor:
    """Return int64 [N, T]: the documents one behind another, cut every ``length`` tokens.

    Each document ends with eos; what is left at the end and fills no row is left out. ValueError if
    nothing fills a row.
    """
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([t for one in encoded for t in (*one, tokenizer.eos_token_id)])
    if length < 1 or len(ids) < length:
        raise ValueError(
            f"length={length}: {len(documents)} documents of {len(ids)} tokens fill no row; give a "
            "length from 1 to that number, or more text"
        )
    return ids[: len(ids) // length * length].view(-1, length)
