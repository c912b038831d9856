"""The recipe on two gloo ranks: see recipe_checks."""

from __future__ import annotations

from pathlib import Path

from regate_ds.training.configuration import load_config
from regate_ds.training.runner import run_teacher
from tests.distributed.ranks import run_ranks
from tests.integration.recipe_checks import check_recipe
from tests.integration.small_task import make_task


def test_a_run_repeats_resumes_and_can_be_switched_off(tmp_path: Path):
    make_task(tmp_path)
    run_ranks(check_teacher, 1, str(tmp_path))
    run_ranks(check_recipe, 2, str(tmp_path))


def check_teacher(rank: int, folder: str) -> None:
    run_teacher(load_config(Path(folder) / "run.yaml"))
