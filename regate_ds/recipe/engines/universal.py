"""DeepSpeed's universal checkpoint, for a resume on another number of ranks.

ZeRO cuts the optimizer's state by rank. DeepSpeed's own converter puts it together, parameter by
parameter, in a folder inside the checkpoint, from which any number of ranks takes its part.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from regate_ds.job.process import Process
from regate_ds.parallel.collectives import broadcast_text

FOLDER = "universal"
"""Name of the converted checkpoint inside the one it is made from; it lives while it is loaded."""


def add_universal(settings: dict[str, Any]) -> None:
    """Let DeepSpeed's settings read a universal checkpoint."""
    settings.setdefault("checkpoint", {})["load_universal"] = True


@contextmanager
def converted(checkpoint: Path, process: Process) -> Iterator[str]:
    """Convert a checkpoint on the first rank, yield the folder's name, and delete it. Collective.

    ValueError on all ranks, with the converter's last line, if it fails: there is no room for it,
    as a rule, since it takes as much as the checkpoint itself.
    """
    error = _convert(checkpoint) if process.is_first else ""
    error = broadcast_text(error, process.group, process.device)
    if error:
        raise ValueError(
            f"{checkpoint} cannot be converted for {process.world_size} ranks ({error}); make room "
            "for a second copy of it, or resume with as many ranks as wrote it"
        )
    yield FOLDER
    dist.barrier()
    if process.is_first:
        _clear(checkpoint)


@contextmanager
def mended_stage_3(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo what a universal load under ZeRO-3 (deepspeed 0.19.8) does to torch's optimizer.

    It gives all parts one tensor as their step, which then counts once for each of them, and all
    groups the settings of the first, weight decay among them.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    yield
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


def _convert(checkpoint: Path) -> str:
    """Run DeepSpeed's converter; return its last line if it failed."""
    _clear(checkpoint)
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    told = ["--input_folder", str(checkpoint), "--output_folder", str(checkpoint / FOLDER)]
    done = subprocess.run([*command, *told], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    _clear(checkpoint)
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]


def _clear(checkpoint: Path) -> None:
    """Delete what this or a killed job has converted."""
    shutil.rmtree(checkpoint / FOLDER, ignore_errors=True)
    (checkpoint / f"latest_{FOLDER}").unlink(missing_ok=True)
