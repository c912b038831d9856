"""A result: what one run gave, as a JSON file under version control."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regate_ds.recipe.learning.files import RunKey
from regate_ds.recipe.tasks.pretraining.phase import digest_of_files
from regate_ds.stores.atomic_file import make_folder, write_atomically


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of one run, and what made it."""

    arm: str
    seed: int
    fraction: float
    digest: str
    """Name of the settings that the run was made with."""

    student: str
    """Name of the weights that it started from: another machine may round a seed to others."""

    date: str
    machine: str
    accuracy_visual: float
    """Share of the held-out words that need the image and are right, teacher-forced."""

    accuracy_plain: float
    """The same of the other words."""

    loss: float
    num_words_visual: int
    num_dense: int
    """Dense steps of the run."""

    num_sparse: int
    tokens_processed: float
    answer_tokens_processed: float
    image_tokens_processed: float
    train_cpu_seconds: float
    """As they were in this run; the cost by steps is measured apart."""

    kept_precision: float | None
    """Share of the words that sparse steps kept that need the image; None if they chose none."""

    kept_recall: float | None
    """Share of the words that need the image that sparse steps kept."""

    @property
    def num_steps(self) -> int:
        return self.num_dense + self.num_sparse


def student_of(folder: Path) -> str:
    """Return the name of a student's weights."""
    return digest_of_files(sorted(folder.glob("*.safetensors")))[:12]


def require_one_student(found: Iterable[tuple[RunKey, Result]]) -> None:
    """Refuse, by ValueError, to compare runs of one seed that did not start from one student."""
    first: dict[tuple[str, int], tuple[RunKey, str]] = {}
    for key, result in found:
        other, student = first.setdefault((key.task, key.seed), (key, result.student))
        if result.student != student:
            raise ValueError(
                f"{key.task}: {other.name} started from student {student}, {key.name} from "
                f"{result.student}, as on machines that round differently; delete the results of "
                "one, and run the round again"
            )


def path_of(results: Path, key: RunKey) -> Path:
    return results / key.task / key.part / f"{key.name}.json"


def write_result(path: Path, result: Result) -> None:
    make_folder(path.parent)
    write_atomically(path, (json.dumps(asdict(result), indent=1) + "\n").encode())


def read_result(path: Path) -> Result | None:
    """Return a result, None if there is none; ValueError names a file that is damaged."""
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return Result(**values)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is no result ({error}); delete it, and it is run again") from None


def finished(path: Path, digest: str) -> Result | None:
    """Return the result of a run; ValueError if it was made with other settings."""
    found = read_result(path)
    if found is not None and found.digest != digest:
        raise ValueError(
            f"{path} was made with other settings (digest {found.digest}, now {digest}); delete "
            "it to run it again, or give the new settings another name"
        )
    return found
