"""Two data ranks under DeepSpeed against one process; many cases in one process group."""

from __future__ import annotations

import pytest

from tests.adapters.deepspeed.zero_cases_helper import CASES, RANKS
from tests.adapters.deepspeed.zero_checks_helper import check_all_gradients
from tests.adapters.deepspeed.zero_runs_helper import RUNS, check_all_runs
from tests.support.ranks import Failures, failures_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gradient_failures(tmp_path_factory) -> Failures:
    return failures_of(check_all_gradients, len(RANKS), tmp_path_factory.mktemp("gradients"))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process_on_the_joint_batch(name, gradient_failures):
    assert name not in gradient_failures, "\n".join(gradient_failures[name])


@pytest.fixture(scope="module")
def run_failures(tmp_path_factory) -> Failures:
    return failures_of(check_all_runs, len(RANKS), tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_several_steps(name: str, run_failures: Failures):
    assert name not in run_failures, "\n".join(run_failures[name])
