"""What frozen states tell of a class: a linear map, fitted by least squares on some samples.

Shapes: N samples, H width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.objectives.contract import TokenRows

_RIDGE = 1e-2
"""Weight of the squared map, for states of variance 1."""


@torch.no_grad()
def pooled_states(module: nn.Module, batches: Sequence[TokenRows], *, of_patches: bool) -> Tensor:
    """Return the mean of each row's states [N, H]: of its patches, or of its text.

    A module that reads in both directions gives the mean of both.
    """
    own: Any = module
    found = []
    module.eval()
    for rows in batches:
        if hasattr(own, "streams"):
            streams = own.streams(rows)
            both: list[Tensor] = [streams.right_BSH, streams.left_BSH]
        else:
            both = [own.main(rows.ids_BT, rows.is_real_BT, rows.patches_BPF)]
        found.append(torch.stack([_mean(one, rows, of_patches) for one in both]).mean(dim=0))
    module.train()
    return torch.cat(found).double()


def _mean(states_BSH: Tensor, rows: TokenRows, of_patches: bool) -> Tensor:
    num = rows.num_patches
    if of_patches:
        return states_BSH[:, :num].mean(dim=1)
    real_BT1 = rows.is_real_BT[:, :, None]
    return (states_BSH[:, num:] * real_BT1).sum(dim=1) / real_BT1.sum(dim=1)


def fitted_scores(train_NH: Tensor, wanted_NC: Tensor, test_NH: Tensor) -> Tensor:
    """Return each class's score of the test samples, by ridge regression on the training ones."""
    mean, deviation = train_NH.mean(dim=0), train_NH.std(dim=0) + 1e-9
    x, x_test = ((one - mean) / deviation for one in (train_NH, test_NH))
    offset = wanted_NC.mean(dim=0)
    gram = x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return x_test @ torch.linalg.solve(gram, x.T @ (wanted_NC - offset)) + offset


def accuracy(scores_NC: Tensor, kind_N: Tensor) -> float:
    """Return the share of samples whose class has the highest score."""
    return float((scores_NC.argmax(dim=1) == kind_N).double().mean())


def mean_ranking(scores_NC: Tensor, holds_NC: Tensor) -> float:
    """Return the mean over classes of the area under the curve of hits over false alarms.

    That is the share of pairs of a sample with the class and one without it in which the first has
    the higher score.
    """
    areas = []
    for scores_N, holds_N in zip(scores_NC.T, holds_NC.T.bool(), strict=True):
        with_N, without_N = scores_N[holds_N], scores_N[~holds_N]
        wins = (with_N[:, None] > without_N).double() + 0.5 * (with_N[:, None] == without_N)
        areas.append(wins.mean())
    return float(torch.stack(areas).mean())
