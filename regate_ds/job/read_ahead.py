"""Read the next batches while another one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Batch = TypeVar("_Batch")
_Content = TypeVar("_Content")

_AHEAD = 2
"""Number of batches that are read while another one is computed."""


def read_ahead(read: Callable[[_Batch], _Content], batches: Sequence[_Batch]) -> Iterator[_Content]:
    """Yield what ``read`` returns for each batch, and read the next ones meanwhile in a thread."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = deque(reader.submit(read, batch) for batch in batches[:_AHEAD])
        for number in range(len(batches)):
            content = pending.popleft().result()
            if number + _AHEAD < len(batches):
                pending.append(reader.submit(read, batches[number + _AHEAD]))
            yield content
