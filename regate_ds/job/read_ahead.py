"""Read the next batches while another one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_Batch = TypeVar("_Batch")
_Content = TypeVar("_Content")

_AHEAD = 2
"""Number of batches that are read while another one is computed."""


def read_ahead(read: Callable[[_Batch], _Content], batches: Iterable[_Batch]) -> Iterator[_Content]:
    """Yield what ``read`` returns for each batch, and read the next ones meanwhile in a thread."""
    coming = iter(batches)
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = deque(reader.submit(read, batch) for batch in islice(coming, _AHEAD))
        while pending:
            content = pending.popleft().result()
            pending.extend(reader.submit(read, batch) for batch in islice(coming, 1))
            yield content
