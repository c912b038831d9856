"""Read a student's weights one tensor, or a part of it, at a time: no rank holds it whole."""

from __future__ import annotations

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
    """The safetensors files of a student's folder, by the names of transformers' model."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Find each weight under the names that transformers' own loading reads it by."""
        self._saved = SavedWeights(folder)
        wanted = model.state_dict()
        changes = get_model_conversion_mapping(model)
        renamings = [one for one in changes if isinstance(one, WeightRenaming)]
        self._names: dict[str, str] = {}
        for stored in self._saved.names:
            name, _ = rename_source_key(
                stored, renamings, [], model.base_model_prefix, meta_state_dict=wanted
            )
            self._names[stored if name not in wanted else name] = stored
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        if missing := sorted(wanted.keys() - self._names.keys() - tied):
            raise ValueError(
                f"the weights in {folder} have no {missing[0]} ({len(missing)} of {len(wanted)} "
                "are missing); give the folder of a whole student"
            )

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._saved.shape(self._names[name])

    def read(self, name: str, cut: WeightCut | None = None) -> Tensor:
        return self._saved.read(self._names[name], cut)
