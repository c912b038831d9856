"""Two gloo ranks in each kind of loop; many cases in one process group."""

from __future__ import annotations

import pytest

from tests.adapters.torch.rank_checks_helper import CHECKS, check_all
from tests.support.ranks import Failures, failures_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Failures:
    return failures_of(check_all, 2, tmp_path_factory.mktemp("loops"))


@pytest.mark.parametrize("name", CHECKS)
def test_gradients_are_those_of_one_process_on_the_joint_batch(name: str, failures: Failures):
    assert name not in failures, "\n".join(failures[name])
