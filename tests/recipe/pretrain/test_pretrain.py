"""`regate pretrain` on one rank and on two: see pretrain_helper."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.recipe.pretrain.pretrain_helper import (
    STEPS,
    check_one_rank,
    check_two_ranks,
    make_data,
    metrics,
)
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs that both worlds have made."""
    folder = tmp_path_factory.mktemp("pretrain")
    make_data(folder)
    run_ranks(check_two_ranks, 2, str(folder))
    run_ranks(check_one_rank, 1, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("one", "two"), [("one", "two"), ("one-pictures", "two-pictures")])
def test_a_run_on_two_ranks_is_the_run_on_one_up_to_rounding(runs: Path, one: str, two: str):
    """The rows of a step are the same; in micro-batches of the captions, lengths are uneven."""
    found, wanted = metrics(runs, two), metrics(runs, one)
    assert len(found) == len(wanted) == STEPS
    for row, other in zip(found, wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    assert wanted[-1]["loss"] < wanted[0]["loss"]


@pytest.mark.slow
def test_a_stage_of_zero_changes_no_figure(runs: Path):
    for row, other in zip(metrics(runs, "two-zero-2"), metrics(runs, "two"), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_the_main_model_is_written_as_a_folder_of_hugging_face(runs: Path):
    model = AutoModel.from_pretrained(runs / "two" / "model")
    tokenizer = AutoTokenizer.from_pretrained(runs / "two" / "model")
    ids = torch.tensor([tokenizer("row 3").input_ids])
    assert model(input_ids=ids).last_hidden_state.shape == (1, ids.shape[1], 24)
    assert tokenizer.mask_token_id == len(tokenizer) - 1 == model.config.vocab_size - 1


def test_training_loads_no_objective():
    code = (
        "import sys; from regate_ds.recipe import trainer; import regate_ds.cli; "
        "print([m for m in sys.modules if 'objectives' in m or 'pretrain.' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
