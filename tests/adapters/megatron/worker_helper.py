"""A persistent worker: takes cases from its parent and answers with what they found."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1


def work(rank: int, pipe: Connection, log_path: str, parent: int) -> None:
    """Until the parent closes the pipe. ``(world, function, argument, meeting, timeout)`` a job."""
    ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    with open(log_path, "w") as log:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        import torch

        torch.set_num_threads(1)
        from regate_ds.adapters.megatron_on_cpu.shim import install

        install()
        while True:
            try:
                world, function, argument, meeting, timeout = pipe.recv()
            except EOFError:
                return
            faulthandler.dump_traceback_later(timeout, file=log)
            worked, answer = _job(rank, world, function, argument, meeting, timeout)
            pipe.send((worked, (answer, num_threads()) if worked else answer))
            faulthandler.cancel_dump_traceback_later()


def _job(
    rank: int, world: int, function: Callable[[Any], Any], argument: Any, meeting: str, timeout: int
) -> tuple[bool, Any]:
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        answer = function(argument)
        dist.barrier()
        return True, answer
    except BaseException:
        return False, traceback.format_exc()
    finally:
        leave()


def leave() -> None:
    """Gloo's threads live as long as its groups: destroy all of them, Megatron's too."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    # Its cache of tables keeps models alive, and with them their groups.
    RotaryEmbedding.forward.cache_clear()
    mpu.destroy_model_parallel()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def num_threads() -> int:
    """Threads of this process, gloo's included."""
    with open("/proc/self/status") as status:
        line = next(row for row in status if row.startswith("Threads:"))
    return int(line.split()[1])
