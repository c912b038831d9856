"""Be a rank of the job that a command runs as, and end with the others if one of them fails."""

from __future__ import annotations

import _thread
import atexit
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from regate_ds.job.errors import USER_ERRORS, JobFailed, one_line
from regate_ds.job.preemption import Preempted
from regate_ds.job.process import Process, start_process
from regate_ds.job.watch import DIED, Failure, Watch
from regate_ds.parallel.collectives import broadcast_text, sum_over

GRACE_SECONDS = 10.0
"""How long a rank that waits for others in a collective may go on after one of them has failed."""

_ECHOES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
"""Found in errors of a collective that lost a peer: they do not say why."""


@contextmanager
def join_job(command: str) -> Iterator[Process]:
    """Be part of the job, and leave it in order.

    With several ranks every error becomes ``JobFailed``, the same on all of them: that of the rank
    that failed first. The others end within ``GRACE_SECONDS``, wherever they are.
    """
    process = start_process()
    with watched(process, command):
        yield process
        dist.barrier()
    dist.destroy_process_group()


@contextmanager
def watched(process: Process, command: str) -> Iterator[None]:
    """End with the others, as in ``join_job``; all ranks enter and leave it together."""
    if process.group is None:
        yield
        return
    ended = threading.Event()
    exchange: Any = partial(sum_over, group=process.group, device=process.device)
    notify = partial(_end_with, command=command, process=process, ended=ended)
    # torchrun may meet on another machine than the first rank's.
    host = broadcast_text(socket.gethostname(), process.group, process.device)
    watch = Watch(process.rank, [os.environ["MASTER_ADDR"], host], exchange, notify)
    try:
        yield
    except Preempted:
        watch.close()
        raise
    except BaseException as error:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        text = "interrupted" if is_interrupt else one_line(error)
        failure = watch.fail(text, is_doubtful=_is_echo(error))
        # Collectives that wait for a peer which is gone must not hold the process at its exit.
        atexit.register(_leave_at_once)
        if isinstance(error, USER_ERRORS) or failure.rank != process.rank:
            raise JobFailed(str(failure), is_printed=failure.rank != process.rank) from error
        raise
    else:
        watch.close()
    finally:
        ended.set()


def _end_with(failure: Failure, *, command: str, process: Process, ended: threading.Event) -> None:
    """In a thread, when another rank has failed: end this one, by force if it must be."""
    if failure.text == DIED and _speaks_for(failure.rank, process):
        # The dead rank's progress bar has no end of line.
        tqdm.write(f"\nregate {command}: {failure}", file=sys.stderr)
        sys.stderr.flush()
    _thread.interrupt_main()
    if not ended.wait(GRACE_SECONDS):
        _leave_at_once()


def _speaks_for(dead: int, process: Process) -> bool:
    """The first rank, or where that is the one that died, the first that is left on each node."""
    if dead != 0:
        return process.is_first
    return process.rank == 1 or os.environ.get("LOCAL_RANK") == "0"


def _leave_at_once() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)


def _is_echo(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(echo in text for echo in _ECHOES)
