"""Small jobs of every kind that can be started, killed, and compared.

Ranks are forked from one process that has imported the frameworks, into a process group of their
own, so that all of them can be killed at once, as a lost node would.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 (for the ranks to come)
import numpy as np
import torch
from tqdm.std import TqdmDefaultWriteLock

from regate_ds.adapters.megatron_on_cpu.shim import install
from regate_ds.cli import main
from regate_ds.recipe import rank_job, teacher_job, trainer  # noqa: F401 (likewise)
from tests.support.small_corpus import TEXT, make_corpus

# tqdm 4.70.1 has one lock for the bars of all processes that are forked from one. A rank that is
# killed while it has the lock would keep it from those behind it for ever.
TqdmDefaultWriteLock.mp_lock = None

_MEGATRON = ("run.deepspeed=null", "parallel={pipeline: 2}", "run.accumulation=4")


@dataclass(frozen=True)
class Job:
    """A command on some ranks; what it writes lies in ``out``, a key of its configuration."""

    command: str
    num_ranks: int
    out: str
    settings: tuple[str, ...] = ()

    @property
    def on_megatron(self) -> bool:
        return _MEGATRON[1] in self.settings


_TRAIN = ("run.resume=auto", "run.save_every=2", "run.keep_checkpoints=2", "run.eval_every=6")
_ORDERS = ("elision.images.ranking=diversity", "rank.batch=3")

JOBS = {
    "train on one rank": Job("train", 1, "run.out", _TRAIN),
    "train on two ranks": Job("train", 2, "run.out", _TRAIN),
    "train on two Megatron stages": Job("train", 2, "run.out", (*_TRAIN, *_MEGATRON)),
    "teacher": Job("teacher", 1, "teacher.store", ("teacher.tokens_per_batch=256",)),
    "rank": Job("rank", 1, "rank.store", _ORDERS),
}


def prepare(folder: Path) -> None:
    """Make corpus, student and the reference store of ``folder/run.yaml``."""
    make_corpus(folder, text={**TEXT, "num_hidden_layers": 4})
    teacher = [sys.executable, "-m", "regate_ds.cli", "teacher", str(folder / "run.yaml")]
    subprocess.run(teacher, check=True)


def start(job: Job, folder: Path, out: Path, more: Sequence[str] = ()) -> list[int]:
    """Start the job's ranks; return their process ids, of which the first is their group."""
    arguments = [job.command, str(folder / "run.yaml"), f"{job.out}={out}", *job.settings, *more]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: list[int] = []
    for rank in range(job.num_ranks):
        group = ranks[0] if ranks else 0
        if (child := os.fork()) == 0:
            os.setpgid(0, group)
            _be_rank(rank, job, port, arguments, out.with_name(f"{out.name}-{rank}.log"))
        os.setpgid(child, group or child)
        ranks.append(child)
    return ranks


def _be_rank(rank: int, job: Job, port: int, arguments: list[str], log: Path) -> None:
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job.num_ranks),
        )
        torch.set_num_threads(1)
        if job.on_megatron:
            install()
        code = main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(ranks: Sequence[int]) -> list[int]:
    """Return the ranks' exit codes, below 0 for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


def kill(ranks: Sequence[int]) -> None:
    os.killpg(ranks[0], signal.SIGKILL)


def result_of(out: Path) -> dict[str, Any]:
    """Return what two equal jobs have alike: weights, metrics without times, difficulty, stores."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if path.name in ("metrics.jsonl", "evals.jsonl"):
            found[name] = [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".npz" and "checkpoints" in name:
            if name.split("/")[1] == _last_checkpoint(out):
                with np.load(path) as file:
                    found[name] = {key: file[key].tobytes() for key in file.files}
        elif "checkpoints" not in name and path.name not in _OF_ONE_RUN:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


_OF_ONE_RUN = {"summary.json", "config.yaml"}


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "second" not in key}


def _last_checkpoint(out: Path) -> str:
    return (out / "checkpoints" / "latest").read_text().strip()
