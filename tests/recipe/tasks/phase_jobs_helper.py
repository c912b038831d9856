"""What the tests of phases run in processes of their own; importing it is quick."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from regate_ds.recipe.tasks.pretraining.phase import average_gradients


def touch(out: Path) -> None:
    (out / "made").touch()


def check_gradients_are_averaged(ranks: ProcessGroup) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    average_gradients(model, ranks)
    model(torch.tensor([1.0, 4.0 * ranks.rank()])).backward()
    assert torch.equal(model.weight.grad, torch.tensor([[1.0, 2.0]]))
