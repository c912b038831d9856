"""One line for the whole job."""

from __future__ import annotations

import errno

import pytest

from regate_ds.job import errors
from regate_ds.job.errors import JobFailed, print_error


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", seconds.append)
    return seconds


def set_rank(monkeypatch, rank: int) -> None:
    values = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_a_process_alone_and_the_first_rank_speak_at_once(monkeypatch, capsys, slept):
    monkeypatch.delenv("RANK", raising=False)
    print_error("train", ValueError("no such\n  key"))
    set_rank(monkeypatch, 0)
    print_error("train", ValueError("no such\n  key"))
    assert capsys.readouterr().err == 2 * "regate train: no such key\n"
    assert slept == []


def test_another_rank_lets_the_first_speak_before_it(monkeypatch, capsys, slept):
    set_rank(monkeypatch, 3)
    print_error("train", ValueError("only here"))
    assert capsys.readouterr().err == "regate train: rank 3: only here\n"
    assert slept == [15.0]


@pytest.mark.parametrize(
    ("is_printed", "expected"), [(True, ""), (False, "\nregate eval: rank 3: no\n")]
)
def test_the_error_of_a_job_is_told_once(monkeypatch, capsys, slept, is_printed, expected):
    set_rank(monkeypatch, 3)
    print_error("eval", JobFailed("rank 3: no", is_printed=is_printed))
    assert capsys.readouterr().err == expected
    assert slept == []


def test_an_error_without_words_is_named(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    print_error("train", RuntimeError())
    assert "RuntimeError without a message" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out/manifest.json", None])
def test_a_full_disk_is_told_with_what_to_do(capsys, name):
    print_error("teacher", OSError(errno.ENOSPC, "No space left on device", name))
    assert capsys.readouterr().err == (
        f"regate teacher: there is no room for {name or 'a file of this job'} (No space left on "
        "device); make room there, then give the same command again\n"
    )
