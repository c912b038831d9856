"""Questions and answers for trainers of conversations, and the oracle of one of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.data.collate import Batch
from tests.support.measure import Gradients, gradients
from tests.support.oracle import oracle_loss

QUESTION = ["what", "is", "shown", "?", "a", "red", "blue", "3", "7"]
ANSWER = ["a", "blue", "digit", "at", "the", "top", "a", "red", "7", "at", "the", "top"]


def question(number: int) -> str:
    return " ".join(QUESTION[number % 3 : 4 + number % 5])


def answer(number: int) -> str:
    return " ".join(ANSWER[number % 4 : 6 + number % 6])


def embedded(host: nn.Module, inputs: dict[str, Any]) -> Tensor:
    ids_BT = inputs["input_ids"]
    words_BTH = host.get_input_embeddings()(ids_BT)
    if inputs.get("pixel_values") is None:
        return words_BTH
    pixels = inputs["pixel_values"].double()
    found = host.model.get_image_features(pixels, return_dict=True).pooler_output
    is_image_BT1 = (ids_BT == host.config.image_token_id)[..., None]
    return words_BTH.masked_scatter(is_image_BT1, torch.cat(tuple(found)))


def gated_of(host: nn.Module) -> range:
    return range(1, len(host.get_decoder().layers))


def oracle(exact: nn.Module, micro: Sequence[tuple[Batch, Any]]) -> tuple[float, Gradients]:
    """The loss and the gradients of a step, each micro-batch with its plan, in fp64."""
    exact.zero_grad()
    host = exact.get_base_model() if hasattr(exact, "get_base_model") else exact
    total = torch.zeros((), dtype=torch.double)
    for batch, plan in micro:
        inputs = embedded(host, batch.inputs)
        total = total + oracle_loss(host, inputs, batch.tokens, plan, gated_of(host))
    loss = total / sum(plan.num_targets for _, plan in micro)
    loss.backward()
    return loss.item(), gradients(exact)
