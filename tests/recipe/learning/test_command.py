"""What the command refuses before it runs anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regate_ds.recipe.learning import command


def test_beside_a_gpu_tables_are_read_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = ["quick", "--results", str(tmp_path), "--work", str(tmp_path / "work")]
    with pytest.raises(ValueError, match="counts CPU seconds.*CUDA_VISIBLE_DEVICES="):
        command.main(told)
    assert command.main([*told, "--tables"]) == 1
    assert (tmp_path / "quick.md").read_text().startswith("### digits, dev: 0 of 9 runs")
    assert not (tmp_path / "work").exists()
