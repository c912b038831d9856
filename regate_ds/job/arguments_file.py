"""Arguments of a command that lie in a file, for launchers that pass them by a shell.

pdsh joins a command's words for the shell of each node, which would split and expand them, and
replaces %n, %h and %u itself. launch/deepspeed.sh therefore writes the arguments into the folder
that all nodes share, each with a zero byte after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

OPTION = "--arguments-file"

_SHARE = "set LOGS to a folder that all nodes share"


def from_file(given: Sequence[str]) -> list[str]:
    """Return the arguments that a file holds if that is what is given, else those given.

    ValueError if this node does not see the whole file.
    """
    match given:
        case [option, path] if option == OPTION:
            return read_arguments(Path(path))
        case _:
            return list(given)


def read_arguments(path: Path) -> list[str]:
    """Return the arguments, byte for byte as they were written. ValueError if one is missing."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {_SHARE}") from error
    *arguments, rest = content.split(b"\0")
    if rest or not arguments:
        raise ValueError(f"{path} does not end as it was written; {_SHARE}")
    return [argument.decode("utf-8", "surrogateescape") for argument in arguments]
