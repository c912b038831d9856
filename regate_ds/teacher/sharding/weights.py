"""Read a model's weights one tensor, or a part of it, at a time: no rank has to hold them all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class WeightCut(NamedTuple):
    """A range of rows (dim 0) or columns (dim 1) of a tensor."""

    dim: int
    start: int
    stop: int


class WeightSource(Protocol):
    """A source of weights, by their names in the whole model."""

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor, without reading it."""
        ...

    def read(self, name: str, cut: WeightCut | None = None) -> Tensor:
        """Return the tensor, or the part ``cut`` of it, on the CPU."""
        ...


class LoadedWeights:
    """The weights of a model that is loaded whole."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def read(self, name: str, cut: WeightCut | None = None) -> Tensor:
        tensor = self._state[name].detach().cpu()
        return tensor if cut is None else tensor.narrow(cut.dim, cut.start, cut.stop - cut.start)


class SavedWeights:
    """The safetensors files of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        """Find the file of each tensor. ValueError if the folder has no safetensors files."""
        self.folder = folder
        self._files = _files(folder)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first tensor by name."""
        return self.read(min(self._files)).dtype

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor. ValueError as in ``read``."""
        with self._opened(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, cut: WeightCut | None = None) -> Tensor:
        """Read the tensor, or the part ``cut`` of it. ValueError if it is missing or unreadable."""
        with self._opened(name) as file:
            if cut is None:
                return file.get_tensor(name)
            part, rows = file.get_slice(name), slice(cut.start, cut.stop)
            return part[rows].clone() if cut.dim == 0 else part[:, rows].clone()

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """Open the tensor's file, anew each time, so that the pages read are freed with it."""
        if name not in self._files:
            raise ValueError(
                f"the weights in {self.folder} have no {name}; give the folder of a whole causal "
                "language model"
            )
        try:
            with safe_open(self._files[name], framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise _unreadable(self.folder, error) from error


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    if (folder / INDEX).is_file():
        try:
            places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in places.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _unreadable(folder, error) from error
    if not (folder / SINGLE).is_file():
        raise ValueError(
            f"{folder} holds neither {SINGLE} nor {INDEX}: a sharded teacher is read from "
            "safetensors; save it as such, or set teacher.sharding=none"
        )
    try:
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    except SafetensorError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"the weights in {folder} cannot be read ({error}); copy or download them again"
    )
