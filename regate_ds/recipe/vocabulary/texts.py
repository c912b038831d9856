"""The texts of a data set, as its samples' tokens say them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def texts_of(ids_S: Tensor, tokenizer: Any, special: frozenset[int]) -> Iterator[str]:
    """Yield the text of each run of tokens between special ones, whose texts stay as they are.

    ids_S: int64 token ids of one sample. special: ids of what is no text: added tokens, and those
    in the place of images.
    """
    run: list[int] = []
    for one in [*ids_S.tolist(), None]:
        if one is not None and one not in special:
            run.append(one)
        elif run:
            yield tokenizer.decode(run, clean_up_tokenization_spaces=False)
            run = []
