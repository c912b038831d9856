"""The losses of labels are those of the cross-entropy over all logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regate_ds.teacher.label_loss import HeadPart


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_give_the_cross_entropy_of_all_logits(chunk, bias):
    torch.manual_seed(0)
    head, hidden_NH = nn.Linear(8, 50, bias=bias), 30 * torch.randn(10, 8)
    labels_N = torch.randint(50, (10,))
    with torch.no_grad():
        found_N = HeadPart(head).losses(hidden_NH, labels_N, chunk)
        wanted_N = F.cross_entropy(head.double()(hidden_NH.double()), labels_N, reduction="none")
    torch.testing.assert_close(found_N.double(), wanted_N, rtol=1e-5, atol=1e-5)


def test_no_label_has_no_loss():
    empty_N = HeadPart(nn.Linear(8, 50)).losses(torch.zeros(0, 8), torch.zeros(0).long(), 4)
    assert (empty_N.shape, empty_N.dtype) == ((0,), torch.float32)
