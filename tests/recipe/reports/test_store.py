"""What `regate store` says of a store."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from regate_ds import cli
from regate_ds.data.llava.records import Turn
from regate_ds.recipe.reports.store import word_losses
from regate_ds.stores.reference.manifest import shard_path
from regate_ds.teacher.precompute import precompute
from tests.teacher.plain_job_helper import make_plain_job
from tests.teacher.reference_job_helper import NUM_SAMPLES, make_job


@pytest.fixture
def store(tmp_path: Path) -> Path:
    precompute(make_job(tmp_path / "store"))
    return tmp_path / "store"


def test_info_counts_and_shows_every_loss_in_the_histogram(store: Path, capsys):
    assert cli.main(["store", "info", str(store)]) == 0
    text = capsys.readouterr().out
    job = make_job(store)
    assert f"samples       {NUM_SAMPLES} (0 without an answer)" in text
    assert f"answer tokens {job.index.num_tokens}\n" in text
    shares = [float(line[14:21].strip(" %")) for line in text.splitlines() if " to " in line]
    assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("ask", [["verify"], ["info", "--verify", "full"]], ids=str)
def test_a_flipped_byte_is_found(store: Path, capsys, ask: list[str]):
    assert cli.main(["store", "verify", str(store)]) == 0
    assert "all as written" in capsys.readouterr().out
    path = shard_path(store, 0)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    assert cli.main(["store", *ask, str(store)]) == 1
    assert f"{path} is damaged" in capsys.readouterr().err


def test_info_tells_what_is_being_added(tmp_path: Path, capsys):
    store = tmp_path / "plain"
    precompute(make_plain_job(store, 10))
    # As a job does that is killed before its first shard.
    make_plain_job(store, 30).begin()
    assert cli.main(["store", "info", str(store)]) == 0
    text = capsys.readouterr().out
    assert "samples       10 (0 without an answer)" in text
    assert re.search(r"to come       20 samples are being added, \d+ shards are still", text)


def test_a_word_has_the_losses_of_all_tokens_that_overlap_it():
    turns = (
        Turn(question="What?", answer="A red three.", gold_spans=()),
        Turn(question="Where?", answer="Here.", gold_spans=()),
    )
    # A token that straddles two words counts for both; each answer ends with its eos.
    spans = ((0, 0, 1), (0, 1, 7), (0, 7, 11), (0, 11, 12), (0, 12, 12), (1, 0, 5), (1, 5, 5))
    sample = SimpleNamespace(char_spans=spans)
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 32.0, 16.0, 64.0])
    record = SimpleNamespace(turns=turns)
    found = list(word_losses(record, sample, losses))  # type: ignore[arg-type]
    assert found == [("A", 1.0), ("red", 2.0), ("three.", 14.0), ("Here.", 16.0)]
