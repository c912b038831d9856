"""A sharded teacher is the whole one: losses, name, store; no rank holds or loads it whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.precompute import precompute
from tests.support.ranks import Failures, failures_of
from tests.support.samples import make_index
from tests.teacher.reference_job_helper import NUM_SAMPLES, make_job
from tests.teacher.sharding_helper import FOUR, TWO, check_four, check_two, save_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def four(models: Path) -> Failures:
    (models / "four").mkdir()
    return failures_of(check_four, 4, models / "four")


@pytest.fixture(scope="module")
def two(models: Path) -> Failures:
    (models / "two").mkdir()
    return failures_of(check_two, 2, models / "two")


@pytest.mark.parametrize("name", FOUR)
def test_two_replicas_of_two_ranks(name: str, four: Failures):
    assert name not in four, "\n".join(four[name])


@pytest.mark.parametrize("name", TWO)
def test_one_teacher_on_two_ranks(name: str, two: Failures):
    assert name not in two, "\n".join(two[name])


@pytest.mark.parametrize("name", ["tensor store", "zero3 store"])
def test_a_store_of_a_sharded_teacher_is_that_of_the_whole_one(name, models, four, two, tmp_path):
    precompute(make_job(tmp_path))
    found, wanted = ReferenceStore(models / name), ReferenceStore(tmp_path)
    keys = make_index(NUM_SAMPLES).keys
    # One unit in the last place of fp16: sums over ranks may round to the other side.
    torch.testing.assert_close(found.read(keys), wanted.read(keys), rtol=2**-10, atol=1e-5)
