from datetime import timedelta

import deepspeed
import pytest

from regate_ds.job.process import start_process
from regate_ds.job.ranks import RANK_NAMES


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in RANK_NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("asked", "minutes"), [(None, 360), ("7", 7)])
def test_ranks_wait_longer_for_each_other_than_deepspeed_does(monkeypatch, asked, minutes):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    if asked is not None:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", asked)
    given = {}
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: given.update(options))
    start_process()
    assert given["timeout"] == timedelta(minutes=minutes)
