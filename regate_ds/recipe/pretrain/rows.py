"""The rows of a run: text laid in rows of one length, or pictures with a text each.

Shapes: B rows, T tokens, P patches, F numbers of a patch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from regate_ds.objectives.contract import Inputs, TokenRows
from regate_ds.recipe.pretrain.config import PretrainData
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.recipe.tasks.text.blocks import token_blocks
from regate_ds.recipe.tasks.text.documents import hold_out, read_documents

MASK = "<mask>"


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Training or held-out rows; ``rows`` makes micro-batches of them."""

    name: str
    """Part of the key of each row's draws."""

    ids: Sequence[Tensor]
    """int64 [T] of each row; lengths differ only where rows have pictures."""

    pictures: Sequence[Path] | None
    patch: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, numbers: Sequence[int]) -> TokenRows:
        """Return the rows of these numbers as a micro-batch, on the CPU."""
        own = [self.ids[number] for number in numbers]
        ids = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(one) for one in own])
        is_real = torch.arange(ids.shape[1]) < lengths[:, None]
        keys = tuple((self.name, number) for number in numbers)
        patches = None
        if self.pictures is not None:
            read = [patches_of(self.pictures[number], self.patch) for number in numbers]
            patches = torch.stack(read)
        return TokenRows(keys=keys, ids_BT=ids, is_real_BT=is_real, patches_BPF=patches)


@dataclass(frozen=True, kw_only=True)
class PretrainRows:
    """Everything that a run reads."""

    tokenizer: PreTrainedTokenizerFast
    inputs: Inputs
    train: RowSource
    held_out: RowSource
    longest: int
    """Positions of the longest row, patches included."""

    @property
    def fingerprint(self) -> str:
        """Hash of all rows; a resumed run must have the same."""
        digest = hashlib.sha256()
        for source in (self.train, self.held_out):
            for number, ids in enumerate(source.ids):
                digest.update(ids.numpy().tobytes())
                if source.pictures is not None:
                    digest.update(source.pictures[number].name.encode())
        return digest.hexdigest()[:16]


def open_rows(data: PretrainData) -> PretrainRows:
    """Read the documents, train the tokenizer on the training part, and lay its tokens in rows.

    ValueError names a file that is missing or not as it must be.
    """
    if data.pictures:
        captions = read_captions(data.path)
        documents = list(captions)
    else:
        captions, documents = None, read_documents(data.path, by=data.by)
    train, others = hold_out(documents, share=data.held_out)
    texts = train if captions is None else [captions[one]["text"] for one in train]
    tokenizer = train_tokenizer(texts, vocab_size=data.vocab_size)
    tokenizer.add_special_tokens({"mask_token": MASK})
    parts = [
        _source(data, captions, name, part, tokenizer)
        for name, part in (("train", train), ("held_out", others))
    ]
    return _opened(data, tokenizer, *parts)


def _opened(
    data: PretrainData, tokenizer: Any, train: RowSource, held_out: RowSource
) -> PretrainRows:
    longest = max(len(one) for source in (train, held_out) for one in source.ids)
    patch_size = None
    if train.pictures is not None:
        first = patches_of(train.pictures[0], data.patch)
        longest, patch_size = longest + len(first), first.shape[1]
    inputs = Inputs(
        num_tokens=len(tokenizer),
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
        special_ids=tuple(sorted(tokenizer.all_special_ids)),
        patch_size=patch_size,
    )
    return PretrainRows(
        tokenizer=tokenizer, inputs=inputs, train=train, held_out=held_out, longest=longest
    )


def _source(
    data: PretrainData, captions: Any, name: str, documents: Sequence[str], tokenizer: Any
) -> RowSource:
    if captions is None:
        ids: Any = token_blocks(documents, tokenizer, length=data.length)
        pictures = None
    else:
        texts = [captions[one]["text"] for one in documents]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        cut = data.length - 1
        ids = [torch.tensor([*one[:cut], tokenizer.eos_token_id]) for one in encoded]
        pictures = [data.path.parent / captions[one]["image"] for one in documents]
    return RowSource(
        name=name, ids=ids, pictures=pictures, patch=data.patch, pad_id=tokenizer.pad_token_id
    )


def read_captions(path: Path) -> dict[str, dict[str, str]]:
    """Read a JSONL file of pictures and texts, by the lines themselves.

    ValueError names the line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.path={path}: cannot be read ({error}); give a JSONL file") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            is_whole = all(isinstance(record[key], str) for key in ("image", "text"))
        except (ValueError, KeyError, TypeError):
            is_whole = False
        if not is_whole:
            raise ValueError(
                f"{path}, line {number}: must be an object with texts under image and text; "
                "correct or delete it"
            )
        found[line] = record
    return found


def patches_of(path: Path, side: int) -> Tensor:
    """Return a picture's patches row by row, float32 [P, F] in [-1, 1].

    ValueError for a file that is no picture, or whose sides are no multiples of ``side``.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: is no picture that can be read ({error})") from None
    height, width = pixels.shape[:2]
    if height % side or width % side:
        raise ValueError(
            f"{path}: has {width} x {height} pixels; data.patch={side} must divide both, give "
            "another or scale the pictures"
        )
    grid = torch.from_numpy(pixels.copy()).view(height // side, side, width // side, side, 3)
    patches = grid.transpose(1, 2).flatten(0, 1).flatten(1)
    return patches.float() / 127.5 - 1.0
