"""What a configuration names: the student, its records, and how they become batches."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoTokenizer

from regate_ds.algorithm.batch import host_labels
from regate_ds.data.collate import Batch, Collator, LoadedSample, SampleDataset
from regate_ds.data.llava.encode import EncodedSample, Encoder
from regate_ds.data.llava.records import BadRecord, Record, SampleError, read_records
from regate_ds.job.progress import progress
from regate_ds.recipe.config.sections import DataConfig, LoraConfig, ModelConfig
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.students.student import (
    Student,
    build_llava,
    build_qwen2_vl,
    load_student,
    vision_tower,
)
from regate_ds.stores.answer_index import AnswerIndex

_BUILDERS = {"llava": build_llava, "qwen2_vl": build_qwen2_vl}

_HOST_REFUSALS = (
    StrictDataclassError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
"""What building a model ends in where a value of the user's own config dicts is of a wrong kind."""


@dataclass(frozen=True)
class Task:
    """A student and the data it is trained and tested on."""

    student: Student
    train_records: list[Record]
    test_records: list[Record]
    bad: list[BadRecord]
    """Records that `data.skip_bad` left out, of both sets."""

    index: AnswerIndex
    """Of the training set."""

    encoder: Encoder
    collator: Collator

    @property
    def train(self) -> SampleDataset:
        return SampleDataset(self.train_records, self.encoder)

    @property
    def test(self) -> SampleDataset:
        return SampleDataset(self.test_records, self.encoder)


def build_task(config: RunConfig, *, weights: bool = True) -> Task:
    """Load or make the student, and read the records. Without ``weights`` it is on "meta"."""
    student = make_student(config.model, seed=config.run.seed if weights else None)
    if config.data.pack_length is not None and student.model.config.model_type == "qwen2_vl":
        raise ValueError(
            f"data.pack_length={config.data.pack_length}: a qwen2_vl student has three position "
            "axes, which packed rows do not carry; set it to null"
        )
    data = config.data
    encoder = Encoder(
        student.tokenizer,
        image_token=student.image_token,
        num_image_tokens=student.vision.num_tokens,
        max_length=data.max_length,
        template=data.template,
    )
    train, bad, index = _read(data.train, data.name, data, encoder)
    test, bad_test, _ = _read(data.test, "test", data, encoder) if data.test else ([], [], None)
    collator = Collator(
        pad_id=student.pad_id,
        vision=student.vision,
        pack_length=data.pack_length,
    )
    return Task(student, train, test, bad + bad_test, index, encoder, collator)


def make_student(config: ModelConfig, *, seed: int | None) -> Student:
    """Load the student from a directory, or make it from `text` and `vision` with fresh weights.

    With ``seed`` None the model is on "meta", without weights.
    """
    if config.path is not None:
        attention = config.attn_implementation
        return load_student(config.path, attention=attention, weights=seed is not None)
    if config.tokenizer is None:
        raise ValueError("model.tokenizer=None: a student made from `text` and `vision` needs one")
    if not Path(config.tokenizer).is_dir():
        raise ValueError(f"model.tokenizer={config.tokenizer}: no such folder")
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, local_files_only=True)
    build, parts = _BUILDERS[config.kind], {"text": config.text, "vision": config.vision}
    try:
        student = build(tokenizer, **parts, seed=seed)
    except _HOST_REFUSALS as error:
        raise ValueError(
            f"model.kind={config.kind}: transformers makes no model of {parts}: "
            f"{type(error).__name__}: {error}"
        ) from error
    student.model.set_attn_implementation(config.attn_implementation)
    return student


def trainable(student: Student, config: ModelConfig, *, seed: int) -> nn.Module:
    """The student as it is trained: LoRA, frozen tower and activation checkpointing, if asked.

    Adapters get their weights from ``seed`` alone.
    """
    model: nn.Module = student.model
    if config.freeze_vision:
        vision_tower(student.model).requires_grad_(False)
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _with_lora(student, config.lora)
    return model.train()


class HostLabels:
    """Gives the host its own labels (the token *at* t), for runs without elision."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, samples: list[LoadedSample]) -> Batch:
        batch = self._collator(samples)
        return Batch({**batch.inputs, "labels": host_labels(batch.tokens.labels_BT)}, batch.tokens)


def _read(
    path: Path, name: str, data: DataConfig, encoder: Encoder
) -> tuple[list[Record], list[BadRecord], AnswerIndex]:
    """The usable records, each encoded once to see that it can be, and their index.

    Without `data.skip_bad` the first bad one is an error.
    """
    records, bad = read_records(path, name=name, image_root=data.image_root, skip_bad=data.skip_bad)
    index = AnswerIndex.build(_encoded(records, name, encoder, bad if data.skip_bad else None))
    keys = set(index.keys)
    usable = [record for record in records if record.key in keys]
    if not usable:
        raise ValueError(f"{path} has no usable record; training and testing need at least one")
    return usable, bad, index


def _encoded(
    records: Sequence[Record], name: str, encoder: Encoder, bad: list[BadRecord] | None
) -> Iterator[EncodedSample]:
    """Encode one record after the other; those that cannot be go to ``bad``, if it is there."""
    show = os.environ.get("RANK", "0") == "0"
    with progress(len(records), desc=f"check {name}", unit="record", show=show) as bar:
        for record in records:
            try:
                yield encoder.encode(record)
            except SampleError as error:
                if bad is None or error.bad is None:
                    raise
                bad.append(error.bad)
            bar.update()


def _with_lora(student: Student, config: LoraConfig) -> Any:
    import peft

    _require_targets(student, config.target_modules)
    modules = "|".join(map(re.escape, config.target_modules))
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] (a float scales as well)
        lora_dropout=config.dropout,
        # The vision tower has layers of the same names; adapters belong to the text backbone.
        target_modules=rf".*language_model.*\.({modules})",
    )
    student.model.enable_input_require_grads()
    return peft.get_peft_model(student.model, adapters)


def _require_targets(student: Student, targets: Sequence[str]) -> None:
    """peft itself is content if one of several targets is found."""
    linear = {
        name.rpartition(".")[2]
        for name, module in student.model.named_modules()
        if isinstance(module, nn.Linear) and "language_model." in name
    }
    for target in targets:
        if target not in linear:
            raise ValueError(
                f"model.lora.target_modules: the text backbone has no linear layer {target!r}; it "
                f"has {', '.join(sorted(linear))}"
            )
