"""What a run reads that is computed once before training: its job, and what it costs.

    python -m regate_ds.recipe.learning.once_job teacher|rank CONFIG COST

The seconds go to the file COST when the job is done: without it the job starts anew.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.rank_job import run_rank
from regate_ds.recipe.teacher_job import run_teacher
from regate_ds.stores.atomic_file import write_atomically

JOBS = {"teacher": run_teacher, "rank": run_rank}


def main(arguments: Sequence[str]) -> int:
    job, config, cost = arguments
    torch.set_num_threads(1)
    begin = time.process_time()
    JOBS[job](load_config(Path(config)))
    seconds = time.process_time() - begin
    write_atomically(Path(cost), (json.dumps({"cpu_seconds": seconds}) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
