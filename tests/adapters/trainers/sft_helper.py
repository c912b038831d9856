"""Questions and answers for trainers of conversations, and the oracle of one of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.data.collate import Batch
from tests.support.measure import Gradients, gradients
from tests.support.oracle import Rotary, oracle_loss

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
    seen = {"pixel_values": inputs["pixel_values"].double()}
    if "image_grid_thw" in inputs:
        seen["image_grid_thw"] = inputs["image_grid_thw"]
    found = host.model.get_image_features(**seen, return_dict=True).pooler_output
    is_image_BT1 = (ids_BT == host.config.image_token_id)[..., None]
    return words_BTH.masked_scatter(is_image_BT1, torch.cat(tuple(found)))


def rotary_of(host: Any, inputs: dict[str, Any]) -> list[Rotary] | None:
    """Each row's cos and sin [T, D] in fp64, where positions have several axes; else None."""
    positions = inputs.get("position_ids")
    if positions is None or positions.dim() < 3:
        return None
    decoder = host.get_decoder()
    found = decoder.rotary_emb(torch.zeros(1, dtype=torch.double), positions)
    sections = decoder.config.rope_parameters["mrope_section"]
    cos_BTD, sin_BTD = (_joined(one, sections) for one in found)
    return list(zip(cos_BTD, sin_BTD, strict=True))


def _joined(table: Tensor, sections: list[int]) -> Tensor:
    """A table [B, T, D]: older transformers gives one for each axis, which its layers join."""
    if table.dim() == 3:
        return table
    parts = table.split(sections * 2, dim=-1)
    return torch.cat([part[axis % 3] for axis, part in enumerate(parts)], dim=-1)


def gated_of(host: nn.Module) -> range:
    return range(1, len(host.get_decoder().layers))


def oracle(exact: nn.Module, micro: Sequence[tuple[Batch, Any]]) -> tuple[float, Gradients]:
    """The loss and the gradients of a step, each micro-batch with its plan, in fp64."""
    exact.zero_grad()
    host = exact.get_base_model() if hasattr(exact, "get_base_model") else exact
    total = torch.zeros((), dtype=torch.double)
    for batch, plan in micro:
        inputs = embedded(host, batch.inputs)
        rotary_B = rotary_of(host, batch.inputs)
        total = total + oracle_loss(host, inputs, batch.tokens, plan, gated_of(host), rotary_B)
    loss = total / sum(plan.num_targets for _, plan in micro)
    loss.backward()
    return loss.item(), gradients(exact)
