"""Every family with an empty image on two ZeRO ranks, of which one sees images and one does not:

    python -m tests.families.zero [--stages 1,2,3] [names]

Families that take videos run a second step, in whose micro-batches the ranks see images, videos,
both or neither, each differently.

The losses, and the gradients that the optimizer is given, are compared with one process on the
joint batch, in fp32. A rank that makes other collective calls than its neighbour would hang: the
pool is then ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from regate_ds.data.collate import Batch
from regate_ds.families.table import FAMILIES as RECORDS
from regate_ds.job.process import start_process
from tests.adapters.deepspeed.zero_cases_helper import ZeroCase
from tests.adapters.deepspeed.zero_checks_helper import check_gradients, run_named
from tests.families.rows import Row, write_rows
from tests.families.zoo.cases import Case, cases_of
from tests.families.zoo.models.family import Family, attentions_of, build
from tests.families.zoo.models.table import FAMILIES
from tests.families.zoo.videos import mixed_case, mixes_of
from tests.support.ranks import run_ranks

TIMEOUT_SECONDS = 1500
VIDEOS = " with videos"
IMAGES_ELIDED = (("images.keep_share", 0.5),)
FEW = ("llava over qwen2", "qwen3_vl", "gemma3")
"""Families that run under every stage; the others under stage 3 alone."""

ONE_TOKEN = (
    *("internvl", "aya_vision", "cohere2_vision"),
    *("got_ocr2", "pp_chart2table", "qianfan_ocr"),
)
"""Families whose tiny images have one token, which is never elided."""


@dataclass(frozen=True)
class FamilyCase(ZeroCase):
    """One step of a family of the zoo: rank 0 has images in two of three rows, rank 1 has text."""

    @property
    def name(self) -> str:
        return f"{self.family}, ZeRO-{self.stage}"

    def model(self) -> nn.Module:
        family = FAMILIES[self.family]
        return build(family, attentions_of(family)[0]).float()

    def batches(self, rank: int) -> list[Batch]:
        family = FAMILIES[self.family]
        cases = {case.name: case for case in cases_of(family, self.model())}
        return [_of_rank(cases["images" if rank == 0 else "text"], f"rank{rank}")]


@dataclass(frozen=True)
class VideoCase(FamilyCase):
    """One step of a family that takes videos, with a micro-batch for each mix."""

    @property
    def name(self) -> str:
        return f"{self.family}{VIDEOS}, ZeRO-{self.stage}"

    def batches(self, rank: int) -> list[Batch]:
        family, host = FAMILIES[self.family], self.model()
        found = []
        for number, mix in enumerate(mixes_of(family)):
            case = mixed_case(family, host, mix[rank], seed=2 * number + rank)
            found.append(_of_rank(case, f"rank{rank}-{number}"))
        return found


def _of_rank(case: Case, name: str) -> Batch:
    """Return the micro-batch in single precision, with samples of that name."""
    keys = tuple(tuple((name, number) for _, number in row) for row in case.batch.keys)
    image_BT = case.batch.image_BT
    if image_BT is None:
        image_BT = torch.full_like(case.batch.labels_BT, -1)
    inputs = {name: _single(x) for name, x in case.inputs.items()}
    return Batch(inputs, replace(case.batch, keys=keys, image_BT=image_BT))


def _single(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def cases(names: list[str], stages: list[int]) -> dict[str, FamilyCase]:
    """Return the cases by name: each family with a record under ZeRO-3, FEW under all stages.

    Where images and videos reach different weights, videos run under all stages too.
    """
    made: list[FamilyCase] = []
    for name, family in FAMILIES.items():
        is_asked = not names or name in names
        if family.make_images is None or not is_asked or _model_type(family) not in RECORDS:
            continue
        record = RECORDS[_model_type(family)]
        elides = record.image_lengths is not None and not name.startswith(ONE_TOKEN)
        knobs = IMAGES_ELIDED if elides else ()
        made += [
            FamilyCase(family=name, stage=stage, knobs=knobs)
            for stage in stages
            if stage == (2 if record.runs_by_image else 3) or name in FEW or names
        ]
        if record.runs_by_image or not (mixes := mixes_of(family)):
            continue
        made += [
            VideoCase(family=name, stage=stage, accumulation=len(mixes), knobs=knobs)
            for stage in stages
            if stage == 3 or record.empty_video is not None
        ]
    return {case.name: case for case in made}


def _model_type(family: Family) -> str:
    return family.config().model_type


def check_families(rank: int, folder: str) -> None:
    """Run in each rank: the cases that the folder lists; write what failed of each."""
    transformers.logging.set_verbosity_error()
    start_process()
    for number, name in enumerate((Path(folder) / "cases.txt").read_text().splitlines()):
        if rank == 0:
            print(name, flush=True)
        family, stage = name.rsplit(", ZeRO-", 1)
        case = cases([family.removesuffix(VIDEOS)], [int(stage)])[name]
        run_named(rank, folder, {name: lambda case=case: check_gradients(rank, case)})
        (Path(folder) / f"rank{rank}.json").rename(Path(folder) / f"done{rank}-{number}.json")


def failures_among(names: list[str]) -> dict[str, str]:
    """Run the cases in a pool of two ranks; one that ends the pool is followed by a new pool."""
    failures: dict[str, str] = {}
    while names:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "cases.txt").write_text("\n".join(names))
            error = _error_of_pool(folder)
            for path in Path(folder).glob("done*.json"):
                failures |= json.loads(path.read_text())
            num_done = len(list(Path(folder).glob("done0-*.json")))
        if error is not None:
            failures[names[min(num_done, len(names) - 1)]] = error
        names = names[num_done + 1 :] if error is not None else []
    return failures


def _error_of_pool(folder: str) -> str | None:
    try:
        run_ranks(check_families, 2, folder, timeout=TIMEOUT_SECONDS)
    except (ProcessExitedException, ProcessRaisedException, TimeoutError) as error:
        return str(error)
    return None


def row_of(case: FamilyCase, failures: dict[str, str]) -> Row:
    verdict = "wrong" if case.name in failures else "exact"
    model_class = FAMILIES[case.family].model_class
    return {"family": case.family, "class": model_class, "stage": case.stage, "verdict": verdict}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of families; default all with an empty image")
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--rows", type=Path, help="file for the JSON rows")
    arguments = parser.parse_args()
    stages = [int(one) for one in arguments.stages.split(",")]
    chosen = cases(arguments.names, stages)
    failures = failures_among(list(chosen))
    write_rows(arguments.rows, [row_of(case, failures) for case in chosen.values()])
    for name, message in failures.items():
        print(f"wrong: {name}\n{message}", file=sys.stderr)
    print(f"{len(chosen) - len(failures)} of {len(chosen)} exact; not: {sorted(failures)}")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
