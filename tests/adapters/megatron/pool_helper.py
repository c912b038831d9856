"""Worker processes that stay alive from case to case: importing megatron-core takes seconds.

A case takes as many of them as it has ranks; a case that fails or takes too long ends all, as the
other ranks may wait for the one that failed.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.adapters.megatron.worker_helper import work

TIMEOUT_SECONDS = 120
MAX_THREADS = 30
"""Most threads of a worker between cases: gloo groups that are never destroyed show here first."""


class Pool:
    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="regate-megatron-")
        self._number = itertools.count()

    def run(
        self,
        world: int,
        function: Callable[[Any], Any],
        argument: Any,
        timeout: int = TIMEOUT_SECONDS,
    ) -> list[Any]:
        """``function(argument)`` on every rank; their answers. AssertionError tells the failed."""
        starting = self._start(world)
        meeting = Path(self._folder.name) / f"meet{next(self._number)}"
        pipes = self._pipes[:world]
        for pipe in pipes:
            pipe.send((world, function, argument, str(meeting), timeout))
        # Imports are not the case's time.
        answers = self._answers(pipes, timeout + (60 if starting else 0))
        meeting.unlink(missing_ok=True)
        failed = [f"rank {r}: {text}" for r, (ok, text) in enumerate(answers) if not ok]
        if failed:
            self.close()
            raise AssertionError(f"{argument}\n" + "\n".join(failed))
        most = max(load for _, (_, load) in answers)
        assert most <= self._max_threads, f"{argument}: a worker has {most} threads"
        return [answer for _, (answer, _) in answers]

    def _start(self, world: int) -> bool:
        """Have as many workers as ranks; whether any of them is new."""
        context, before = mp.get_context("spawn"), len(self._processes)
        for rank in range(before, world):
            ours, theirs = context.Pipe()
            log = Path(self._folder.name) / f"rank{rank}.log"
            process = context.Process(
                target=work, args=(rank, theirs, str(log), os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        return world > before

    def _answers(self, pipes: list[Any], timeout: int) -> list[tuple[bool, Any]]:
        """Results of all ranks; after the first failure the others get two seconds."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(pipes) and time.monotonic() < deadline:
            for rank, pipe in enumerate(pipes):
                if rank in answers or not pipe.poll(0.01):
                    continue
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (False, "the process died")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 2)
        hung = set(range(len(pipes))) - answers.keys()
        for rank in hung:
            log = (Path(self._folder.name) / f"rank{rank}.log").read_text()
            answers[rank] = (False, f"no answer\n{log}")
        return [answers[rank] for rank in range(len(pipes))]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
