"""Name a teacher by what decides its losses, not by its path or the ranks that hold it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_IRRELEVANT = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)
"""Keys of a model's configuration that may differ between copies of one model, but not its losses.
"""


def teacher_id(teacher: nn.Module, *, pad_id: int) -> str:
    """Name a Hugging Face model by a hash over its configuration, its weights and ``pad_id``.

    pad_id: the token id that the teacher reads in place of image placeholders.
    """
    return id_of_weights(teacher.config, sorted(teacher.state_dict().items()), pad_id=pad_id)


def id_of_weights(config: Any, weights: Iterable[tuple[str, Tensor]], *, pad_id: int) -> str:
    """Name a model as ``teacher_id`` does, from weights in the order of their names, one by one."""
    settings = [relevant_settings(config.to_dict()), pad_id]
    return name_by_hash(config.model_type, settings, weights)


def name_by_hash(model_type: str, settings: Any, weights: Iterable[tuple[str, Tensor]]) -> str:
    """Name a model by a hash over its settings, and its weights in the order of their names."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        content = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    return f"{model_type}-{digest.hexdigest()[:16]}"


def relevant_settings(value: Any) -> Any:
    """Return the configuration, at any depth, without names, paths and the keys in _IRRELEVANT."""
    if not isinstance(value, dict):
        return value
    return {str(key): relevant_settings(item) for key, item in value.items() if _decides(str(key))}


def _decides(key: str) -> bool:
    is_name_or_path = not {"name", "path"}.isdisjoint(key.split("_"))
    return not (key.startswith("_") or key in _IRRELEVANT or is_name_or_path)
