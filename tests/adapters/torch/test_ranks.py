"""Two gloo ranks in each kind of loop; many cases in one process group."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from regate_ds import Loop
from tests.adapters.deepspeed.zero_checks_helper import run_named
from tests.adapters.torch.pages_helper import PAGES
from tests.adapters.torch.rank_checks_helper import CHECKS
from tests.adapters.torch.runs_helper import (
    ACCUMULATION,
    DROPPED_STEPS,
    EPOCHS,
    RUNS,
    attached,
    collate,
    loader_with,
)
from tests.support.models import causal_lm
from tests.support.ranks import Failures, failures_of
from tests.support.stores import read_difficulty

pytestmark = pytest.mark.slow


def check_all(rank: int, folder: str) -> None:
    checks = {name: partial(check, rank) for name, check in CHECKS.items()}
    runs = {name: partial(run, rank, Path(folder)) for name, run in {**RUNS, **PAGES}.items()}
    # The last check leaves another group of ranks behind.
    run_named(rank, folder, {**runs, **checks})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loops")


@pytest.fixture(scope="module")
def failures(folder: Path) -> Failures:
    return failures_of(check_all, 2, folder)


@pytest.mark.parametrize("name", CHECKS)
def test_gradients_are_those_of_one_process_on_the_joint_batch(name: str, failures: Failures):
    assert name not in failures, "\n".join(failures[name])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_several_steps(name: str, failures: Failures):
    assert name not in failures, "\n".join(failures[name])


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_it_stands_and_off_is_the_loop_before(page: str, failures: Failures):
    assert page not in failures, "\n".join(failures[page])


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_what_two_ranks_have_remembered_is_loaded_by_one(kind: str, folder: Path, failures):
    regate = attached(causal_lm())
    dcp.load({"regate": regate}, checkpoint_id=folder / kind)
    loader = loader_with(regate.collate(collate), sampled=False)
    next(regate.windows(loader, Loop(accumulation=ACCUMULATION)))
    store = regate._opened.difficulty
    wanted = torch.load(folder / f"{kind}-difficulty-of-rank-1.pt")
    assert torch.equal(read_difficulty(store, store.index.keys), wanted)
    assert regate.metrics()["step"] == DROPPED_STEPS // EPOCHS
