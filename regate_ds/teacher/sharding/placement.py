"""Place the teacher on the ranks as `teacher.sharding` says: whole on each, or a part on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from regate_ds.job.process import Process
from regate_ds.job.ranks import announce
from regate_ds.parallel.collectives import broadcast_text, max_tensor, sum_over
from regate_ds.parallel.layout import ParallelLayout, layout_of_replicas, size_of
from regate_ds.teacher.config import TeacherConfig
from regate_ds.teacher.host_text import HostText
from regate_ds.teacher.identity import id_of_weights, teacher_id
from regate_ds.teacher.loading import load_teacher, load_teacher_config
from regate_ds.teacher.sharding.tensor_parallel import (
    ShardedTeacher,
    cut_teacher,
    fill_cut,
    is_tied,
)
from regate_ds.teacher.sharding.weights import LoadedWeights, SavedWeights, WeightSource
from regate_ds.teacher.sharding.zero3 import fill_partitioned, partitioned_teacher


@dataclass(frozen=True)
class TeacherSource:
    """The place to load a teacher from."""

    config: PreTrainedConfig
    load: Callable[[], PreTrainedModel | HostText]
    """Loads the whole model, on the CPU."""

    folder: Path | None = None
    """Hugging Face folder from which parts can be read; None loads the model whole and cuts it."""

    empty: Callable[[], nn.Module] | None = None
    """Makes the model without values, on the current default device; None: transformers' causal
    language model of ``config``."""


@dataclass(frozen=True)
class PlacedTeacher:
    """A teacher that is ready to score on this rank."""

    model: nn.Module
    """The model as ``score_samples`` takes it."""

    id: str
    """Name of the teacher in stores."""

    layout: ParallelLayout
    """``replica``: the ranks that must score the same samples together."""

    in_step: bool
    """Whether all ranks of the job must score equally often."""

    @property
    def ranks_per_replica(self) -> int:
        return size_of(self.layout.replica)


def source_at(path: Path) -> TeacherSource:
    """Make the source of a Hugging Face folder or a GGUF file."""
    folder = path if path.is_dir() else None
    return TeacherSource(load_teacher_config(path), partial(load_teacher, path), folder)


def place_teacher(
    section: TeacherConfig, source: TeacherSource, pad_id: int, process: Process
) -> PlacedTeacher:
    """Build the teacher and read its weights, before the student is built. Collective.

    ValueError if the teacher or the number of ranks does not allow that `teacher.sharding`.
    """
    if section.sharding == "none":
        with _own_turn(source, process):
            model = source.load().to(process.device)  # type: ignore[arg-type]
        layout = ParallelLayout(data=process.group)
        return PlacedTeacher(model, teacher_id(model, pad_id=pad_id), layout, in_step=False)
    dtype = _dtype(source)
    if section.sharding == "zero3":
        empty = partitioned_teacher(
            source.config, dtype=dtype, device=process.device, empty=source.empty
        )
        name = _fill_together(empty, source, pad_id, process)
        return PlacedTeacher(empty, name, ParallelLayout(data=process.group), in_step=True)
    layout = layout_of_replicas(section.tensor)
    assert layout.replica is not None
    empty = cut_teacher(source.config, layout.replica, dtype=dtype, device=process.device)
    name = _fill_apart(empty, source, pad_id, process)
    return PlacedTeacher(empty, name, layout, in_step=False)


def _dtype(source: TeacherSource) -> torch.dtype:
    """Return the dtype that transformers would load: the configuration's, or the weights'."""
    dtype: Any = source.config.dtype
    if dtype is not None:
        return dtype
    return torch.float32 if source.folder is None else SavedWeights(source.folder).dtype


def _fill_together(
    empty: ShardedTeacher, source: TeacherSource, pad_id: int, process: Process
) -> str:
    weights, name = None, ""
    if process.is_first:
        weights = weights_of(source)
        name = id_of_source(source, weights, pad_id)
    fill_partitioned(empty, weights)
    return broadcast_text(name, process.group, process.device)


def _fill_apart(empty: ShardedTeacher, source: TeacherSource, pad_id: int, process: Process) -> str:
    """Read each rank's part, and return the teacher's name on all ranks."""
    name = ""
    with _own_turn(source, process):
        weights = weights_of(source)
        fill_cut(empty, weights)
        if process.is_first:
            name = id_of_source(source, weights, pad_id)
        del weights
    return broadcast_text(name, process.group, process.device)


@contextmanager
def _own_turn(source: TeacherSource, process: Process) -> Iterator[None]:
    """Run the block on all ranks at once, or, if it loads a whole model, on one rank of a node at a
    time: CPU memory then holds one whole model beside the ranks' parts. Collective."""
    turn = 0 if source.folder is not None else announce().local_rank
    last_turn = int(max_tensor(torch.tensor(turn, device=process.device), process.group))
    for _ in range(turn):
        sum_over([0], process.group, process.device)
    yield
    for _ in range(turn, last_turn):
        sum_over([0], process.group, process.device)


def weights_of(source: TeacherSource) -> WeightSource:
    """Open the files of a folder, or load the whole model where there is no folder."""
    if source.folder is not None:
        return SavedWeights(source.folder)
    return LoadedWeights(source.load().state_dict())


def id_of_source(source: TeacherSource, weights: WeightSource, pad_id: int) -> str:
    """Name the teacher as ``teacher_id`` names the whole model, from one tensor at a time."""
    return id_of_weights(source.config, _in_order(source, weights), pad_id=pad_id)


def _in_order(source: TeacherSource, weights: WeightSource) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of the whole model's state, one at a time, in the order of their names."""
    dtype = _dtype(source)
    with torch.device("meta"):
        build = source.empty or partial(AutoModelForCausalLM.from_config, source.config)
        names = sorted(build().state_dict())
    for name in names:
        shared = name == "lm_head.weight" and is_tied(source.config)
        yield name, weights.read("model.embed_tokens.weight" if shared else name).to(dtype)
