"""Programs that a check starts, and ends by their process id."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], log: TextIO
) -> Iterator[subprocess.Popen[str]]:
    """A daemon in the foreground that ends with the block."""
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
