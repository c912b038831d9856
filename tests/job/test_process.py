"""A process joins its job with patience, and a lone one without a port."""

import os
import socket
from datetime import timedelta

import deepspeed
import pytest
import torch.distributed as dist

from regate_ds.job.process import start_process
from regate_ds.job.ranks import RANK_NAMES
from tests.support.ranks import run_ranks


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in RANK_NAMES:
        # Set first, or monkeypatch would leave here what the process sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("asked", "minutes"), [(None, 360), ("7", 7)])
@pytest.mark.parametrize("is_announced", [False, True])
def test_ranks_wait_longer_for_each_other_than_deepspeed_does(
    monkeypatch, asked, minutes, is_announced
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    if asked is not None:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", asked)
    if is_announced:
        for name, value in zip(RANK_NAMES, ("0", "1", "0", "127.0.0.1", "1")):
            monkeypatch.setenv(name, value)
    given = []
    for module, name in ((deepspeed, "init_distributed"), (dist, "init_process_group")):
        monkeypatch.setattr(module, name, lambda *_, **options: given.append(options["timeout"]))
    start_process()
    # A lone process starts torch's group by itself.
    assert given == [timedelta(minutes=minutes)] * (1 if is_announced else 2)


def _starts_alone_on_a_port_in_use(rank: int) -> None:
    dist.destroy_process_group()
    for name in RANK_NAMES:
        del os.environ[name]
    with pytest.MonkeyPatch.context() as patch, socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        patch.setattr("regate_ds.job.process.free_port", lambda: port)
        process = start_process()
        assert os.environ["MASTER_PORT"] == str(port)
    assert process.world_size == 1
    assert dist.get_world_size() == 1
    assert dist.get_backend() == "gloo"


def test_a_lone_process_needs_no_port():
    run_ranks(_starts_alone_on_a_port_in_use, 1)
