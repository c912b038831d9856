"""Give a model the rows of another vocabulary, and the ids of it.

Shapes: V old and W new tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

_ID_ENDINGS = ("_token_id", "_token_ids", "_token_index", "_words_ids", "suppress_tokens")
"""Ends of the names of settings that hold ids."""


def transfer(model: PreTrainedModel, pieces: Sequence[Sequence[int]]) -> None:
    """Replace the rows of embedding and head, in place: W rows, each the mean of its old pieces'.

    pieces: for each new id, the old ids of the same text. ValueError if other weights have a row
    for each token.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    _require_no_other_rows(model, inputs)
    rows = [mean_rows(inputs.weight.detach(), pieces), mean_rows(outputs.weight.detach(), pieces)]
    bias = getattr(outputs, "bias", None)
    bias_W = None if bias is None else mean_rows(bias.detach()[:, None], pieces)[:, 0]
    # Tied weights stay tied; what it draws for new rows is written over.
    model.resize_token_embeddings(len(pieces), mean_resizing=False)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        inputs.weight.copy_(rows[0])
        outputs.weight.copy_(rows[1])
        if bias_W is not None:
            outputs.bias.copy_(bias_W)


def mean_rows(rows_VH: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Return [W, H]: of each new token the mean of its old pieces' rows."""
    flat = torch.tensor([old for one in pieces for old in one], device=rows_VH.device)
    counts_W = torch.tensor([len(one) for one in pieces], device=rows_VH.device)
    owner = torch.repeat_interleave(torch.arange(len(pieces), device=rows_VH.device), counts_W)
    # Sums of bf16 rows would lose what the mean keeps.
    sums_WH = torch.zeros(len(pieces), rows_VH.shape[1], dtype=torch.float64, device=rows_VH.device)
    sums_WH.index_add_(0, owner, rows_VH[flat].double())
    return (sums_WH / counts_W[:, None]).to(rows_VH.dtype)


def renumber(config: PreTrainedConfig | GenerationConfig, old: Any, new: Any) -> None:
    """Give the ids of special tokens in a config, and in those inside it, their new numbers.

    An id that the old tokenizer does not have stays. ValueError names a token that the new one
    lacks.
    """
    vocabulary = new.get_vocab()
    for holder, key, value in list(_ids(config)):
        name = f"{type(holder).__name__}.{key}"
        setattr(holder, key, _renumbered(name, value, old, vocabulary))


def _renumbered(name: str, value: Any, old: Any, vocabulary: Mapping[str, int]) -> Any:
    """Return an id, or the ids of a list, which may hold lists, by their new numbers."""
    if isinstance(value, list | tuple):
        return [_renumbered(name, one, old, vocabulary) for one in value]
    token = old.convert_ids_to_tokens(value) if 0 <= value < len(old) else None
    if token is not None and token not in vocabulary:
        raise ValueError(
            f"{name}={value} is {token!r}, which the new tokenizer does not have as one token; "
            "make it an added token of the old one first"
        )
    return value if token is None else vocabulary[token]


def _ids(config: Any) -> Iterator[tuple[Any, str, Any]]:
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _ids(value)
        elif key.endswith(_ID_ENDINGS) and _is_of_ids(value):
            yield config, key, value


def _is_of_ids(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_of_ids, value))
    return isinstance(value, int) and not isinstance(value, bool)


def _require_no_other_rows(model: PreTrainedModel, known: Any) -> None:
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Embedding) and module is not known:
            raise ValueError(
                f"the decoder of a {type(model).__name__} has rows for tokens in {name} too; such "
                "a model cannot get another vocabulary yet"
            )
