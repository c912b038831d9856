"""The losses of labels are those of the cross-entropy over all logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regate_ds.algorithm.loss import LogitChange
from regate_ds.teacher import head_loss as label_loss
from regate_ds.teacher.head_loss import HeadPart


@pytest.mark.parametrize("num_ids", [1, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_give_the_cross_entropy_of_all_logits(monkeypatch, num_ids, bias):
    monkeypatch.setattr(label_loss, "POSITIONS", 4)
    torch.manual_seed(0)
    head, hidden_NH = nn.Linear(8, 50, bias=bias), 30 * torch.randn(10, 8)
    labels_N = torch.randint(50, (10,))
    with torch.no_grad():
        found_N = HeadPart(head).losses(hidden_NH, labels_N, num_ids)
        wanted_N = F.cross_entropy(head.double()(hidden_NH.double()), labels_N, reduction="none")
    # fp32 against fp64, logits up to a hundred.
    torch.testing.assert_close(found_N.double(), wanted_N, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("change", [LogitChange(scale=0.3), LogitChange(scale=2.0, cap=3.0)])
def test_blocks_change_their_logits_as_the_model_does(change):
    torch.manual_seed(0)
    head, hidden_NH = nn.Linear(8, 50).double(), 3 * torch.randn(10, 8).double()
    labels_N = torch.randint(50, (10,))
    with torch.no_grad():
        found_N = HeadPart(head, change=change).losses(hidden_NH, labels_N, 7)
        wanted_N = F.cross_entropy(change.apply(head(hidden_NH)), labels_N, reduction="none")
    # fp32 sums of fp64 logits.
    torch.testing.assert_close(found_N.double(), wanted_N, rtol=1e-5, atol=1e-5)


def test_no_label_has_no_loss():
    empty_N = HeadPart(nn.Linear(8, 50)).losses(torch.zeros(0, 8), torch.zeros(0).long(), 4)
    assert (empty_N.shape, empty_N.dtype) == ((0,), torch.float32)


def test_no_more_than_a_block_of_logits_exists_at_once(monkeypatch):
    sizes = []

    def of_block(logits_CW, row_C):
        sizes.append(tuple(logits_CW.shape))
        return torch.zeros(len(row_C)), torch.zeros(len(row_C))

    monkeypatch.setattr(label_loss, "POSITIONS", 4)
    monkeypatch.setattr(label_loss, "_block_sums", of_block)
    HeadPart(nn.Linear(8, 50)).losses(torch.zeros(10, 8), torch.zeros(10).long(), 20)
    assert sizes == [(c, w) for c in (4, 4, 2) for w in (20, 20, 10)]
