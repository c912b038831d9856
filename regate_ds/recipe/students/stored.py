"""Read a student's weights one tensor, or a part of it, at a time: no rank holds it whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from regate_ds.recipe.students.config import ModelConfig
from regate_ds.recipe.students.student import Student
from regate_ds.teacher.sharding.weights import (
    INDEX,
    SINGLE,
    LoadedWeights,
    SavedWeights,
    WeightCut,
    WeightSource,
)


def is_in_safetensors(config: ModelConfig) -> bool:
    """Return whether the student is a folder whose weights can be read in parts."""
    return config.path is not None and any((config.path / n).is_file() for n in (INDEX, SINGLE))


def source_of_student(student: Student, config: ModelConfig) -> WeightSource:
    """Return the student's weights by their names in the model.

    They come from its folder where the model is on "meta", else from the model itself.
    ValueError if the folder lacks one.
    """
    if student.model.device.type != "meta":
        return LoadedWeights(student.model.state_dict())
    assert config.path is not None
    return StoredWeights(config.path, student.model)


class StoredWeights:
    """The safetensors files of a student's folder, by the names of transformers' model.

    Where a model has the experts of a layer in one tensor and the files have each in its own, they
    are read one by one, as `...experts.3.up_proj.weight`.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Find each weight under the names that transformers' own loading reads it by."""
        self._saved = SavedWeights(folder)
        wanted = model.state_dict()
        changes = get_model_conversion_mapping(model)
        renamings = [one for one in changes if isinstance(one, WeightRenaming)]
        names: dict[str, str] = {}
        for stored in self._saved.names:
            name, _ = rename_source_key(
                stored, renamings, [], model.base_model_prefix, meta_state_dict=wanted
            )
            name = _name_of_expert(name)
            names[name if name in wanted or _is_of_one_expert(name) else stored] = stored
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        needed = {part for name, weight in wanted.items() for part in _parts(name, weight, names)}
        if missing := sorted(needed - names.keys() - tied):
            raise ValueError(
                f"the weights in {folder} have no {missing[0]} ({len(missing)} of {len(wanted)} "
                "are missing); give the folder of a whole student"
            )
        self._names = names

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._saved.shape(self._names[name])

    def read(self, name: str, cut: WeightCut | None = None) -> Tensor:
        return self._saved.read(self._names[name], cut)


_STORED = re.compile(r"(.*\.experts\.\d+)\.(w1|w2|w3)\.weight")
"""Names of an expert's weights in Mixtral's files."""

_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Tensors of all experts of a layer, and what they are for each."""


def _is_of_one_expert(name: str) -> bool:
    return re.search(r"\.experts\.\d+\.", name) is not None


def _name_of_expert(name: str) -> str:
    found = _STORED.fullmatch(name)
    return f"{found[1]}.{_PROJECTIONS[found[2]]}.weight" if found else name


def _parts(name: str, weight: Tensor, stored: Mapping[str, str]) -> list[str]:
    """Return the names under which a weight of the model is read."""
    stem, _, last = name.rpartition(".")
    if name in stored or not stem.endswith(".experts") or last not in _FUSED:
        return [name]
    return [f"{stem}.{n}.{one}.weight" for n in range(len(weight)) for one in _FUSED[last]]
