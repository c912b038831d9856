"""The baselines of a step on a Hugging Face decoder, written as plainly as they can be.

Each returns the summed loss of its targets and, where a session asks for them, their losses. A test
holds each against the slow oracle of the tests.

Shapes: B rows, T positions, K slots, H hidden, L targets, V vocabulary, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regate_ds.algorithm.batch import IGNORE, host_labels
from regate_ds.algorithm.plan import ElisionPlan

Losses = tuple[Tensor, Tensor | None]


def host_loss(model: Any, ids_BT: Tensor, plan: ElisionPlan) -> Losses:
    """Run the host's own forward pass: the head at every position, and its own loss."""
    labels_BT = host_labels(_labels(plan, ids_BT))
    loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
    return loss * plan.num_targets, None


def labelled_head(model: Any, ids_BT: Tensor, plan: ElisionPlan) -> Losses:
    """Run every layer on every position, and the head at the plan's targets alone."""
    return _head_at_targets(model, _hidden(model, ids_BT), plan)


def full_head(model: Any, ids_BT: Tensor, plan: ElisionPlan) -> Losses:
    """Run layers and head on every position; the targets of the plan alone have a loss."""
    return _head_everywhere(model, _hidden(model, ids_BT), ids_BT, plan)


def every_layer_full_head(model: Any, ids_BT: Tensor, plan: ElisionPlan) -> Losses:
    """Take kept rows out before each layer and put them back behind it, as the paper says."""
    return _head_everywhere(model, _every_layer(model, ids_BT, plan), ids_BT, plan)


def every_layer_labelled_head(model: Any, ids_BT: Tensor, plan: ElisionPlan) -> Losses:
    return _head_at_targets(model, _every_layer(model, ids_BT, plan), plan)


def ours(model: Any, ids_BT: Tensor, plan: ElisionPlan) -> Losses:
    """Run a model to which the plan's configuration is attached."""
    output = model(input_ids=ids_BT, regate_plan=plan)
    return output.loss_sum, output.losses


def _hidden(model: Any, ids_BT: Tensor) -> Tensor:
    return model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state


def _every_layer(model: Any, ids_BT: Tensor, plan: ElisionPlan) -> Tensor:
    decoder = model.get_decoder()
    x_BTH = decoder.embed_tokens(ids_BT)
    cos_BKD, sin_BKD = decoder.rotary_emb(x_BTH, plan.kept_BK)
    index_BKH = plan.kept_BK[:, :, None].expand(-1, -1, x_BTH.shape[-1])
    for layer in decoder.layers:
        x_BKH = x_BTH.gather(1, index_BKH)
        # Without a mask attention is causal; a row holds one sample, its padding at the end.
        y_BKH = layer(x_BKH, attention_mask=None, position_embeddings=(cos_BKD, sin_BKD))
        x_BTH = x_BTH.scatter(1, index_BKH, y_BKH)
    return decoder.norm(x_BTH)


def _head_at_targets(model: Any, hidden_BTH: Tensor, plan: ElisionPlan) -> Losses:
    hidden_LH = hidden_BTH.flatten(0, 1).index_select(0, plan.label_position_L)
    logits_LV = model.get_output_embeddings()(hidden_LH).float()
    losses_L = F.cross_entropy(logits_LV, plan.targets_L, reduction="none")
    return losses_L.sum(), losses_L.detach()


def _head_everywhere(model: Any, hidden_BTH: Tensor, ids_BT: Tensor, plan: ElisionPlan) -> Losses:
    logits_PV = model.get_output_embeddings()(hidden_BTH).float().flatten(0, 1)
    labels_P = _labels(plan, ids_BT).flatten()
    losses_P = F.cross_entropy(logits_PV, labels_P, reduction="none", ignore_index=IGNORE)
    return losses_P.sum(), losses_P.detach().index_select(0, plan.label_position_L)


def _labels(plan: ElisionPlan, ids_BT: Tensor) -> Tensor:
    """Return the plan's targets at the positions that predict them, IGNORE elsewhere."""
    labels_P = torch.full_like(ids_BT.flatten(), IGNORE)
    return labels_P.index_copy(0, plan.label_position_L, plan.targets_L).view_as(ids_BT)
