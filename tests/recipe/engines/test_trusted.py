"""What a distributed checkpoint could smuggle in is told before it is unpickled."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from regate_ds.recipe.engines.megatron.checkpoint.trusted import require_harmless


class Hostile:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


def write(folder: Path, values: dict[str, Any]) -> None:
    checkpoint.save({"weight": torch.ones(2), **values}, checkpoint_id=folder, no_dist=True)


def test_tensors_and_plain_values_pass(tmp_path: Path):
    write(tmp_path, {"step": 3, "groups": [{"lr": 0.1}]})
    torch.save({"step": 3}, tmp_path / "common.pt")
    require_harmless(tmp_path)


@pytest.mark.parametrize("file", ["table", "value", "common"])
def test_what_would_run_code_is_refused_and_does_not_run(tmp_path: Path, file: str):
    folder, mark = tmp_path / "step-000003" / "megatron", tmp_path / "ran"
    write(folder, {"step": Hostile(mark) if file == "value" else 3})
    if file == "table":
        (folder / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
    if file == "common":
        torch.save(Hostile(mark), folder / "common.pt")
    with pytest.raises((ValueError, pickle.UnpicklingError), match="mkdir"):
        require_harmless(folder)
    assert not mark.exists()


def test_the_line_of_a_hostile_table_names_the_way_out(tmp_path: Path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"\.metadata names posix\.mkdir, which .*; ask who wrote"):
        require_harmless(tmp_path)


def test_what_is_no_table_is_told(tmp_path: Path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ValueError, match=r"\.metadata holds a dict, which is no part of a table"):
        require_harmless(tmp_path)


def test_a_checkpoint_of_before_is_told(tmp_path: Path):
    with pytest.raises(ValueError, match="step-000003 is of a version before Megatron-core's dist"):
        require_harmless(tmp_path / "step-000003" / "megatron")
