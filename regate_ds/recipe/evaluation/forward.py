"""The host's own forward pass over a micro-batch, without gradients: evaluation and the starting
weights' losses share it.

Shapes: B rows, T positions, U columns with a label in any row, N label positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regate_ds.data.collate import Batch

Predict = Callable[[Batch], tuple[Tensor, Tensor]]
"""What ``predict`` says of a micro-batch, with the model bound."""


@contextmanager
def dense_inference(model: nn.Module) -> Iterator[None]:
    """Run the body without gradients and dropout, then restore each module's train mode."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # Not model.train(): a user may keep a frozen part in eval mode while the rest trains.
        for module in in_training:
            module.training = True


def predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return whether the argmax is right, and the loss in nats, at each label position [N].

    Both are on the CPU, row by row; logits exist at the columns with a label only.
    """
    labels_BT = batch.tokens.labels_BT
    columns_U = batch.tokens.is_label_BT.any(dim=0).nonzero()[:, 0]
    is_label_BU = batch.tokens.is_label_BT[:, columns_U]
    device = batch.inputs["input_ids"].device
    output = model(**batch.inputs, logits_to_keep=columns_U.to(device), use_cache=False)
    logits_NV = output.logits[is_label_BU.to(device)].float()
    labels_N = labels_BT[:, columns_U][is_label_BU].to(device)
    loss_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    return (logits_NV.argmax(dim=-1) == labels_N).cpu(), loss_N.double().cpu()
