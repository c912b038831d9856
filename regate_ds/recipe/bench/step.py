"""`regate bench`: compare the process CPU time of sparse and dense steps, which take turns.

The ratios hold for one run on one node. No test has a limit on them, because nodes are shared and
noisy.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.none import NoElision
from regate_ds.config import RegateConfig
from regate_ds.recipe.bench.harness import Sizes, interleaved, text_sample
from regate_ds.recipe.bench.teacher import TeacherCase, run_teacher_bench, teacher_table
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.session import Regate
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores


@dataclass(frozen=True, kw_only=True)
class BenchCase(Sizes):
    """Sizes of one micro-batch of samples whose every position is a label."""

    vocabulary: int = 8192
    num_samples: int = 8
    num_tokens: int = 512
    num_pairs: int = 20
    keep_share: float = 0.5
    first_layers: tuple[int, ...] = (0, 1)


class _Memory:
    """Random reference losses in memory, in place of a store's files."""

    def __init__(self, index: AnswerIndex) -> None:
        self.index = index
        self._values_N = torch.rand(index.num_tokens, generator=torch.Generator().manual_seed(1))

    def read(self, keys: Any) -> Tensor:
        return self._values_N[self.index.locate(keys)]


def main(argv: Sequence[str]) -> None:
    """Run the benchmark, print a table, and write JSON if asked."""
    parser = ArgumentParser(prog="regate bench", description=__doc__)
    parser.add_argument("--pairs", type=int, default=BenchCase.num_pairs, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument(
        "--teacher", action="store_true", help="the teacher's scoring against full logits instead"
    )
    args = parser.parse_args(argv)
    if args.teacher:
        result = run_teacher_bench(TeacherCase(num_pairs=args.pairs))
        print(teacher_table(result))
    else:
        result = run_bench(BenchCase(num_pairs=args.pairs))
        print(_table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def run_bench(case: BenchCase) -> dict[str, Any]:
    """Return median CPU seconds of dense and sparse steps, their ratios, and planning's share."""
    torch.set_num_threads(case.num_threads)
    torch.manual_seed(0)
    ids_BT, batch, index = _data(case)
    runs = {
        f"sparse, first_layer={first}": _Run(case, ids_BT, batch, index, first)
        for first in case.first_layers
    }
    dense = _Run(case, ids_BT, batch, index, None)
    steps = {"dense": dense.step, **{name: run.step for name, run in runs.items()}}
    seconds = interleaved(steps, case.num_pairs)
    rows = {name: _row(name, seconds, runs.get(name)) for name in seconds}
    return {"case": asdict(case), "machine": platform.processor(), "steps": rows}


class _Run:
    """A model with an optimizer and a session of its own."""

    def __init__(
        self,
        case: BenchCase,
        ids_BT: Tensor,
        batch: TokenBatch,
        index: AnswerIndex,
        first_layer: int | None,
    ) -> None:
        torch.manual_seed(0)
        self._model = LlamaForCausalLM(case.llama()).train()
        dense = first_layer is None
        config = RegateConfig(
            execution=NoElision() if dense else Elide(),
            keep_share=case.keep_share,
            first_layer=first_layer or 0,
            schedule=ScheduleConfig(warmup=0, final_dense_share=0.0),
        )
        attach_model(self._model, config)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5)
        self._ids_BT, self._batch = ids_BT, batch
        stores = Stores() if dense else Stores(_Memory(index), DifficultyStore(index))
        self._session = Regate(config, stores, total_steps=1_000_000)
        self.overhead: list[float] = []

    def step(self) -> None:
        """Run one optimizer step; append the seconds outside the model's passes to ``overhead``."""
        begin = time.process_time()
        plan = self._session.plan_step([self._batch])
        planned = time.process_time()
        output = self._model(input_ids=self._ids_BT, regate_plan=plan.micro[0])
        (output.loss_sum / plan.num_targets_global).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        passed = time.process_time()
        self._session.record(plan.micro[0], output.losses)
        self._session.finish_step(applied=True)
        self.overhead.append(planned - begin + time.process_time() - passed)


def _row(name: str, seconds: dict[str, list[float]], run: _Run | None) -> dict[str, float]:
    own, dense = seconds[name], seconds["dense"]
    row = {
        "cpu_seconds": statistics.median(own),
        "ratio_to_dense": statistics.median(a / b for a, b in zip(own, dense, strict=True)),
    }
    if run is not None:
        row["overhead_share"] = statistics.median(run.overhead) / row["cpu_seconds"]
    return row


def _data(case: BenchCase) -> tuple[Tensor, TokenBatch, AnswerIndex]:
    ids_BT = case.ids()
    samples = [text_sample(number, ids_S) for number, ids_S in enumerate(ids_BT)]
    labels_BT = torch.stack([sample.labels_S for sample in samples])
    keys = tuple((sample.key,) for sample in samples)
    batch = TokenBatch(keys, torch.zeros_like(labels_BT), labels_BT)
    return ids_BT, batch, AnswerIndex.build(samples)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'step':<24}{'CPU s':>10}{'of dense':>10}{'plan+store':>12}"]
    for name, row in result["steps"].items():
        share = f"{row['overhead_share']:.2%}" if "overhead_share" in row else "-"
        seconds, ratio = row["cpu_seconds"], row["ratio_to_dense"]
        lines.append(f"{name:<24}{seconds:>10.3f}{ratio:>10.3f}{share:>12}")
    return "\n".join(lines)
