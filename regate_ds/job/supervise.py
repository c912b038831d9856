"""Run a command as one rank of a job, and end with the other ranks if one of them fails."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from regate_ds.job.errors import USER_ERRORS, JobFailed, one_line
from regate_ds.job.preemption import Preempted
from regate_ds.job.process import Process, start_process
from regate_ds.job.ranks import RANK_NAMES
from regate_ds.job.watch import Failure, Signs, Watch
from regate_ds.parallel.collectives import broadcast_text, sum_over
from regate_ds.parallel.layout import num_ranks

GRACE_SECONDS = 10.0
"""Seconds after a failure until a rank that still waits in a collective is ended by force."""

_ECHOES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
"""Words in the errors of a collective that lost a peer, which do not name the cause."""


_TOLD = threading.Event()
"""Set once this process has heard that a rank of its job is lost."""


@contextmanager
def join_job(command: str, signs: Signs | None = None) -> Iterator[Process]:
    """Join the job, run the block, and leave the job.

    With several ranks an error becomes ``JobFailed``, with the text of the rank that failed first
    on all of them. The other ranks end within ``GRACE_SECONDS``, whatever they are waiting for.
    signs: by which a rank is found that has stopped without ending.
    """
    with _environment_kept():
        process = start_process()
        with watched(process, command, signs):
            yield process
            dist.barrier()
        dist.destroy_process_group()


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Take away what joining has announced: commands that this process starts are no ranks."""
    before = {name: os.environ[name] for name in RANK_NAMES if name in os.environ}
    try:
        yield
    finally:
        for name in RANK_NAMES:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def watch_ranks(timeout: float | None = 120.0, *, where: Callable[[], str] = str) -> Iterator[None]:
    """Watch the ranks of a training loop of your own, which torch.distributed has joined.

        with watch_ranks(timeout=120, where=lambda: f"step {step}"):
            for window in regate.windows(loader, engine): ...

    If one rank fails, dies or is stopped, the others end within seconds, whatever they wait for.
    Its error is raised there; on the others KeyboardInterrupt ends what they do, and ``JobFailed``,
    a RuntimeError with the rank and its error, leaves the block. Collective: all ranks enter.

    ``sys.exit`` with 0 or nothing leaves in order; other codes fail, and are kept.

    timeout: seconds without a sign of life after which a rank counts as lost; None waits for ever.
    where: what this rank is doing, to be named if it is lost; called in another thread.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"watch_ranks(timeout={timeout}): must be above 0 seconds, or None")
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            f"watch_ranks is called in {threading.current_thread().name}, but only the main thread "
            "can be interrupted when a rank is lost: call it there, around what waits for this one"
        )
    with _watched(_this_process(), "loop", Signs(where, timeout)):
        yield


def _this_process() -> Process:
    if not dist.is_initialized():
        if num_ranks() > 1:
            raise ValueError(
                f"this job has {num_ranks()} ranks, which have not joined: call watch_ranks after "
                "torch.distributed.init_process_group, or what calls it for you"
            )
        return Process(0, 1, torch.device("cpu"))
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return Process(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def watched(process: Process, command: str, signs: Signs | None = None) -> Iterator[None]:
    """End with the other ranks, as ``join_job`` does. All ranks enter and leave it together."""
    try:
        with _watched(process, command, signs or Signs()):
            yield
    except (JobFailed, Preempted):
        raise
    except USER_ERRORS as error:
        if process.group is None:
            raise
        text = str(Failure(process.rank, one_line(error)))
        raise JobFailed(text, is_printed=False) from error


@contextmanager
def _watched(process: Process, command: str, signs: Signs) -> Iterator[None]:
    """Raise this rank's own error as it is, and ``JobFailed`` for another rank's."""
    if process.group is None:
        yield
        return
    ended = threading.Event()
    exchange: Any = partial(sum_over, group=process.group, device=process.device)
    notify = partial(_end_with, command=command, process=process, ended=ended)
    # With torchrun, MASTER_ADDR may be another node than the first rank's.
    first_node = broadcast_text(socket.gethostname(), process.group, process.device)
    addresses = [*filter(None, [os.environ.get("MASTER_ADDR")]), first_node]
    watch = Watch(process.rank, addresses, exchange, notify, signs)
    try:
        with _interruptible():
            watch.start()
            yield
            watch.close()
    except BaseException as error:
        if _is_in_order(error):
            watch.close()
            raise
        failure = watch.fail(_text_of(error), is_doubtful=_is_echo(error))
        # A collective that waits for a lost peer must not hold the process at its exit.
        code = error.code if isinstance(error, SystemExit) else 1
        atexit.register(_leave_at_once, code if isinstance(code, int) else 1)
        if failure.rank != process.rank:
            if not watch.has_notified:
                # This rank's own error was here before the news of its cause.
                _say_if_unsaid(failure, command, process)
            raise JobFailed(str(failure), is_printed=True) from error
        raise
    finally:
        ended.set()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT interrupt this rank when another is lost, also where it is ignored, as in jobs
    that a shell has put into the background, or ends a process at once."""
    before = signal.getsignal(signal.SIGINT)
    if before not in (signal.SIG_IGN, signal.SIG_DFL):
        yield
        return

    def heed(*_: object) -> None:
        if _TOLD.is_set():
            raise KeyboardInterrupt
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with(failure: Failure, *, command: str, process: Process, ended: threading.Event) -> None:
    """End this rank after another has failed, by force if need be. Runs in a thread of its own."""
    _say_if_unsaid(failure, command, process)
    _TOLD.set()
    # A signal also ends a sleep or a read, which _thread.interrupt_main would wait for.
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
    if not ended.wait(GRACE_SECONDS):
        _leave_at_once()


def _say_if_unsaid(failure: Failure, command: str, process: Process) -> None:
    """Print the failure, if the rank could not, and this is the one that prints it instead."""
    if failure.is_unsaid and _speaks_for(failure.rank, process):
        # The lost rank's progress bar may lack an end of line.
        tqdm.write(f"\nregate {command}: {failure}", file=sys.stderr)
        sys.stderr.flush()


def _speaks_for(lost: int, process: Process) -> bool:
    """Return whether this rank prints the loss: the first rank does, or if that one is lost, rank 1
    and the first rank of each node."""
    if lost != 0:
        return process.is_first
    return process.rank == 1 or os.environ.get("LOCAL_RANK") == "0"


def _leave_at_once(code: int = 1) -> None:
    """Exit without waiting for anything."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _is_in_order(error: BaseException) -> bool:
    """Return whether this rank leaves early, as all ranks do: no other one is told of a failure."""
    # Megatron-LM's own loop, for one, ends by sys.exit() where it was asked to stop.
    return isinstance(error, Preempted) or (
        isinstance(error, SystemExit) and error.code in (None, 0)
    )


def _text_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"exit code {error.code}" if isinstance(error, SystemExit) else one_line(error)


def _is_echo(error: BaseException) -> bool:
    """Return whether the error may only follow from another rank's."""
    if isinstance(error, JobFailed):
        # Of a watch inside this one: the rank that failed tells this one too.
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(echo in text for echo in _ECHOES)
