"""The losses of the student's starting weights with the images: a column of reference stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.data.collate import Collator, LoadedSample
from regate_ds.data.llava.clips import load_visuals
from regate_ds.data.llava.images import IMAGE_ERRORS
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.recipe.evaluation.forward import dense_inference, predict
from regate_ds.recipe.students.student import Student
from regate_ds.teacher.identity import name_by_hash, relevant_settings
from regate_ds.teacher.precompute import ScoreSamples
from regate_ds.teacher.tokenizers.other import TwiceWritten


@dataclass(frozen=True)
class StudentLosses:
    """Scores samples by a whole student, one sample a row."""

    model: nn.Module
    """On its device."""

    collator: Collator
    device: torch.device

    def __call__(self, samples: Sequence[Any]) -> Tensor:
        """Return the loss of every label in nats: fp32 [N] on the CPU, sample by sample.

        ValueError names a sample whose image cannot be read.
        """
        batch = self.collator([_with_images(sample) for sample in samples]).to(self.device)
        with dense_inference(self.model):
            _, losses_N = predict(self.model, batch)
        return losses_N.float()


@dataclass(frozen=True)
class GainOfImages:
    """Scores samples by the text-only teacher's losses less the student's with the images."""

    text: ScoreSamples
    student: StudentLosses

    def __call__(self, samples: Sequence[Any]) -> Tensor:
        return self.text(samples) - self.student(samples)


def student_losses(student: Student, device: torch.device) -> StudentLosses:
    """Move a student to the device, and return what scores samples by it."""
    model: Any = student.model
    collator = Collator(pad_id=student.pad_id, vision=student.vision)
    return StudentLosses(model.to(device), collator, device)


def student_id(student: Student) -> str:
    """Name a student in stores, by a hash over its configuration and its weights."""
    model = student.model
    settings = relevant_settings(model.config.to_dict())
    return name_by_hash(model.config.model_type, settings, sorted(model.state_dict().items()))


def _with_images(sample: EncodedSample | TwiceWritten) -> LoadedSample:
    """Decode the images of a sample; one that is written twice is the student's."""
    own = sample.student if isinstance(sample, TwiceWritten) else sample
    try:
        return LoadedSample(own, tuple(load_visuals(own.images)))
    except IMAGE_ERRORS as error:
        raise ValueError(
            f"an image of sample {own.key} cannot be read ({error}); restore the file, or leave "
            "the sample out: `regate data check CONFIG` finds such samples"
        ) from error
