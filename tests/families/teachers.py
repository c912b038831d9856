"""Compare the default teacher with the host in every family: ``python -m tests.families.teachers``.

For each family that the adapter takes, a JSON row says how far the teacher's worst loss of a label
is from the loss of the host's own logits on the same text: pad tokens at image positions, no image,
plain positions. Names may be given, also with a ``*``. The exit code is 1 if a teacher is wrong.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, SampleKey
from regate_ds.families.hosts import supported
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.scoring import score_samples, teacher_inputs
from tests.families.rows import TOLERANCE, Row, add_arguments, chosen, rows_of, write_rows
from tests.families.zoo.cases import Case, cases_of
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.models.family import Family, attentions_of, build
from tests.families.zoo.models.sizes import PADDING
from tests.families.zoo.models.table import FAMILIES

NUM_IDS = 40
"""Ids of a block of the head: three blocks for the tiny vocabulary."""


@dataclass(frozen=True)
class Text:
    """A row of a case as the teacher reads it."""

    key: SampleKey
    input_ids_S: Tensor
    labels_S: Tensor
    is_placeholder_S: Tensor


def teacher_error(family: Family, attention: str) -> float:
    """Return the largest difference of a label's loss, in nats. Call it within ``in_fp64``."""
    host: Any = build(family, attention).eval()
    teacher: Any = text_backbone(host)
    teacher.config._experts_implementation = "eager"  # the others do not know fp64
    worst = 0.0
    for case in cases_of(family, host):
        if case.name != "packed":  # the teacher reads a sample a row
            rows = texts_of(case)
            found_N = score_samples(teacher, rows, pad_id=PADDING, num_ids=NUM_IDS)
            worst = max(worst, float((found_N - host_losses(host, rows)).abs().max()))
    return worst


@torch.no_grad()
def host_losses(host: Any, rows: list[Text]) -> Tensor:
    """Return the loss of every label [N] by the host's own logits."""
    placeholders = [row.is_placeholder_S for row in rows]
    inputs = teacher_inputs([row.input_ids_S for row in rows], placeholders, PADDING)
    logits_BTV = host(**inputs.named(), use_cache=False).logits.double()
    losses = [
        torch.nn.functional.cross_entropy(
            logits_TV[: len(row.labels_S)], row.labels_S, ignore_index=IGNORE, reduction="none"
        )[row.labels_S != IGNORE]
        for logits_TV, row in zip(logits_BTV, rows, strict=True)
    ]
    return torch.cat(losses)


def texts_of(case: Case) -> list[Text]:
    """Return the rows of a case without their padding."""
    batch = case.batch
    image_BT = torch.full_like(batch.labels_BT, -1) if batch.image_BT is None else batch.image_BT
    lengths = (batch.segment_BT >= 0).sum(dim=1).tolist()
    return [
        Text(
            batch.keys[row][0],
            case.inputs["input_ids"][row, :length],
            batch.labels_BT[row, :length],
            image_BT[row, :length] >= 0,
        )
        for row, length in enumerate(lengths)
    ]


def measure(name: str) -> Row | None:
    """Return the row of a family; None if the adapter does not take the class."""
    family = FAMILIES[name]
    if not _is_supported(family):
        return None
    row: Row = {"family": family.name, "class": family.model_class}
    start = time.process_time()
    try:
        for attention in attentions_of(family):
            with in_fp64():
                row[attention] = teacher_error(family, attention)
    except Exception as error:  # a row of the table, as the run goes on to the next family
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    seconds = round(time.process_time() - start, 1)
    return {**row, "cpu_seconds": seconds, "verdict": _verdict(row)}


def _is_supported(family: Family) -> bool:
    """Return whether the adapter takes the class, without memory for its weights."""
    try:
        with torch.device("meta"):
            supported(getattr(transformers, family.model_class)(family.config()))
    except Exception:  # not built, or refused: tests/families/run.py says which
        return False
    return True


def _verdict(row: Row) -> str:
    right = "error" not in row and all(
        row[attention] <= TOLERANCE for attention in ("sdpa", "eager") if attention in row
    )
    return "exact" if right else "wrong"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = rows_of(measure, [family.name for family in chosen(arguments.names)], arguments.jobs)
    write_rows(arguments.rows, rows)
    wrong = [row["family"] for row in rows if row["verdict"] == "wrong"]
    print(f"{len(rows) - len(wrong)} exact, {len(wrong)} wrong: {', '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
