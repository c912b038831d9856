"""`regate bench`: compare the process CPU time of sparse and dense steps, which take turns.

Of each sample the first part is an image, and every position after it is a label. Dense is our own
dense step: its head runs on labels only. The ratios hold for one run on one node. No test has a
limit on them, because nodes are shared and noisy.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.none import NoElision
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.config import RegateConfig
from regate_ds.images_config import ImagesConfig
from regate_ds.recipe.bench.harness import Sizes, interleaved, text_sample
from regate_ds.recipe.bench.teacher import TeacherCase, run_teacher_bench, teacher_table
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.session import Regate
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores


@dataclass(frozen=True, kw_only=True)
class BenchCase(Sizes):
    """Sizes of one micro-batch, and the shares that sparse steps keep."""

    vocabulary: int = 8192
    num_samples: int = 8
    num_tokens: int = 512
    num_pairs: int = 20
    image_share: float = 0.5
    """Share of the positions that are of an image."""

    keep_share: float = 0.5
    image_keep_share: float = 0.5
    first_layers: tuple[int, ...] = (0, 1)


def arms_of(case: BenchCase) -> dict[str, RegateConfig]:
    """Return the kinds of step, by the name of their row."""
    arms = {"dense": RegateConfig(execution=NoElision())}
    for image_share in [1.0, case.image_keep_share] if case.image_share > 0 else [1.0]:
        for first in case.first_layers:
            name = f"answers {case.keep_share:g}, image {image_share:g}, first_layer={first}"
            arms[name] = RegateConfig(
                execution=Elide(),
                keep_share=case.keep_share,
                images=ImagesConfig(keep_share=image_share),
                first_layer=first,
                schedule=ScheduleConfig(warmup=0, final_dense_share=0.0),
            )
    return arms


class _Memory:
    """Random reference losses in memory, in place of a store's files."""

    def __init__(self, index: AnswerIndex) -> None:
        self.index = index
        self._values_N = torch.rand(index.num_tokens, generator=torch.Generator().manual_seed(1))

    def read(self, keys: Any) -> Tensor:
        return self._values_N[self.index.locate(keys)]


def main(argv: Sequence[str]) -> None:
    """Run the benchmark, print a table, and write JSON if asked."""
    parser = ArgumentParser(
        prog="regate bench",
        description=__doc__,
        epilog="`regate bench learning --help`: quality and cost of whole training runs.",
    )
    parser.add_argument("--pairs", type=int, default=BenchCase.num_pairs, metavar="N")
    parser.add_argument(
        "--image-share",
        type=float,
        default=BenchCase.image_share,
        metavar="S",
        help="share of the positions that are of an image, from 0 to below 1",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument(
        "--teacher", action="store_true", help="the teacher's scoring against full logits instead"
    )
    args = parser.parse_args(argv)
    if not 0.0 <= args.image_share < 1.0:
        parser.error(f"--image-share {args.image_share}: must be from 0 to below 1")
    if args.teacher:
        result = run_teacher_bench(TeacherCase(num_pairs=args.pairs))
        print(teacher_table(result))
    else:
        result = run_bench(BenchCase(num_pairs=args.pairs, image_share=args.image_share))
        print(_table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def run_bench(case: BenchCase) -> dict[str, Any]:
    """Return for each kind of step its median CPU seconds, the ratio to dense and to its ideal,
    which is the ratio of the FLOPs, and planning's share."""
    torch.set_num_threads(case.num_threads)
    torch.manual_seed(0)
    ids_BT, batch, index = _data(case)
    runs = {
        name: _Run(case, ids_BT, batch, index, config) for name, config in arms_of(case).items()
    }
    seconds = interleaved({name: run.step for name, run in runs.items()}, case.num_pairs)
    rows = {name: _row(run, seconds[name], seconds["dense"]) for name, run in runs.items()}
    for row in rows.values():
        row["ideal_ratio"] = row["flops"] / rows["dense"]["flops"]
        row["time_over_ideal"] = row["ratio_to_dense"] / row["ideal_ratio"]
    return {"case": asdict(case), "machine": platform.processor(), "steps": rows}


def step_flops(case: Sizes, plan: ElisionPlan, first_layer: int) -> float:
    """Return the FLOPs of a step's matrix products, forward and backward, causal attention at half.

    The layers before ``first_layer`` see every position, the others the plan's slots; the head sees
    the targets. A backward pass counts twice a forward pass.
    """
    llama = case.llama()
    hidden, inner = llama.hidden_size, llama.intermediate_size
    weights = 4 * hidden * hidden + 3 * hidden * inner
    rows = [len(plan.kept_BK) * [plan.num_tokens], (plan.segment_BK >= 0).sum(dim=1).tolist()]
    layers = [first_layer, llama.num_hidden_layers - first_layer]
    products = plan.num_targets * hidden * llama.vocab_size
    for lengths, num_layers in zip(rows, layers, strict=True):
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        products += num_layers * (weights * sum(lengths) + 2 * hidden * pairs)
    return 3 * 2 * products


class _Run:
    """A model with an optimizer and a session of its own."""

    def __init__(
        self,
        case: BenchCase,
        ids_BT: Tensor,
        batch: TokenBatch,
        index: AnswerIndex,
        config: RegateConfig,
    ) -> None:
        torch.manual_seed(0)
        self._case, self._config = case, config
        self._model = LlamaForCausalLM(case.llama()).train()
        attach_model(self._model, config)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5)
        self._ids_BT, self._batch = ids_BT, batch
        stores = Stores(_Memory(index), DifficultyStore(index)) if config.chooses else Stores()
        self._session = Regate(config, stores, total_steps=1_000_000)
        self.overhead: list[float] = []
        self.flops = 0.0

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
        self.flops = step_flops(self._case, plan.micro[0], self._config.first_layer)
        self.overhead.append(planned - begin + time.process_time() - passed)


def _row(run: _Run, own: list[float], dense: list[float]) -> dict[str, float]:
    seconds = statistics.median(own)
    return {
        "cpu_seconds": seconds,
        "ratio_to_dense": statistics.median(a / b for a, b in zip(own, dense, strict=True)),
        "flops": run.flops,
        "overhead_share": statistics.median(run.overhead) / seconds,
    }


def _data(case: BenchCase) -> tuple[Tensor, TokenBatch, AnswerIndex]:
    ids_BT = case.ids()
    samples = [text_sample(number, ids_S) for number, ids_S in enumerate(ids_BT)]
    labels_BT = torch.stack([sample.labels_S for sample in samples])
    is_image_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    is_image_BT[:, : round(case.image_share * case.num_tokens)] = True
    labels_BT = labels_BT.masked_fill(is_image_BT, IGNORE)
    samples = [replace(one, labels_S=labels_S) for one, labels_S in zip(samples, labels_BT)]
    image_BT = torch.where(is_image_BT, 0, -1)
    keys = tuple((sample.key,) for sample in samples)
    batch = TokenBatch(keys, torch.zeros_like(labels_BT), labels_BT, image_BT)
    return ids_BT, batch, AnswerIndex.build(samples)


def _table(result: dict[str, Any]) -> str:
    heads = ("CPU s", "of dense", "FLOPs", "over ideal", "plan+store")
    lines = [f"{'step':<42}" + "".join(f"{head:>12}" for head in heads)]
    for name, row in result["steps"].items():
        figures = [row[key] for key in ("cpu_seconds", "ratio_to_dense", "ideal_ratio")]
        figures.append(row["time_over_ideal"])
        cells = "".join(f"{value:>12.3f}" for value in figures)
        lines.append(f"{name:<42}{cells}{row['overhead_share']:>12.2%}")
    return "\n".join(lines)
