"""`regate train` with `parallel`: the run of the DeepSpeed host, step by step, under any cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.paths import ROOT

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from regate_ds.algorithm.counts import COUNTS
from regate_ds.recipe.reports.compare import compare_runs
from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.pool_helper import Pool
from tests.recipe.engines.reference_helper import STEPS
from tests.recipe.engines.runs_helper import (
    Reading,
    Run,
    check_reading,
    train,
    train_plainly,
    train_with_own_attention,
    train_with_teacher,
)

TIMES = {"step_seconds", "cpu_seconds", "teacher_seconds"}

HALF = "run.accumulation=2"
"""Two data ranks have the batch of one."""

TIMEOUT_SECONDS = 400
"""Seconds for a whole run, its model's loading and its evaluation, on a loaded machine."""


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with its reference losses and a run on DeepSpeed."""
    folder = tmp_path_factory.mktemp("recipe")
    start("tests.recipe.engines.reference_helper", str(folder), "llama")
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The finished student's, without the head, which is tied to the embedding."""
    found = load_file(run / "model" / "model.safetensors")
    return {name: weight for name, weight in found.items() if name != "lm_head.weight"}


def difficulty(run: Path) -> list[np.ndarray]:
    """What each data rank held at the end."""
    last = run / "checkpoints" / f"step-{STEPS:06d}" / "regate"
    return [np.load(path)["column.difficulty"] for path in sorted(last.glob("difficulty-*.npz"))]


def require_equal_runs(found: Path, wanted: Path) -> None:
    """All counts exactly; loss, norm and weights but for the order of sums in single precision."""
    rounded = {"loss", "grad_norm", "lr"}
    for mine, theirs in zip(rows(found), rows(wanted), strict=True):
        assert mine.keys() - TIMES == theirs.keys() - TIMES
        # Rows are padded to one length in a window, not in each micro-batch, which costs FLOPs.
        for key in mine.keys() - rounded - TIMES - {"padded", "flops"}:
            assert mine[key] == theirs[key], (key, mine, theirs)
        for key in rounded:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-6), (key, mine, theirs)
    mine, theirs = weights(found), weights(wanted)
    for name, weight in theirs.items():
        # The gradient of a key's bias is zero in theory: its steps are made of rounding.
        if not name.endswith("k_proj.bias"):
            error = float((mine[name] - weight).norm())
            assert error <= 1e-5 * float(weight.norm()) + 1e-7, (name, error)


CUTS = [
    (2, "tensor: 2, sequence: true, recompute: selective", ()),
    (2, "pipeline: 2, virtual: 2", ()),
    (2, "context: 2, row_format: ragged", ()),
    (4, "tensor: 2, pipeline: 2, sequence: true, recompute: full", ()),
    (2, "distributed_optimizer: true", ("run.accumulation=2",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "parallel", "more"), CUTS, ids=[c[1] for c in CUTS])
def test_every_cut_makes_the_run_of_one_deepspeed_rank(
    pool: Pool, corpus: Path, world: int, parallel: str, more: tuple[str, ...]
):
    out = parallel.replace(": ", "").replace(", ", "-")
    kind = train_with_own_attention if "context" in parallel else train
    pool.run(world, kind, Run(corpus, out, (f"parallel={{{parallel}}}", *more)), TIMEOUT_SECONDS)
    require_equal_runs(corpus / out, corpus / "deepspeed")
    summaries = [
        json.loads((corpus / name / "summary.json").read_text()) for name in (out, "deepspeed")
    ]
    assert summaries[0].keys() == summaries[1].keys()
    for key in ("accuracy_visual", "accuracy_plain", "tokens_processed", "num_words_plain"):
        assert summaries[0][key] == summaries[1][key]
    assert summaries[0]["loss"] == pytest.approx(summaries[1]["loss"], rel=1e-6)
    table = compare_runs([corpus / out, corpus / "deepspeed"])
    assert "note: parallel." in table


ONLINE = ("teacher.mode=online", "teacher.store=null")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "more"),
    [("tensor: 2, sequence: true", ()), ("distributed_optimizer: true", (HALF,))],
)
def test_a_teacher_in_the_job_makes_the_run_of_its_store(
    pool: Pool, corpus: Path, parallel: str, more: tuple[str, ...]
):
    """On ranks that share a replica's samples, and on ranks with samples of their own."""
    out = "online " + parallel.replace(":", "")
    run = Run(corpus, out, (f"parallel={{{parallel}}}", *more, *ONLINE))
    pool.run(2, train_with_teacher, run, TIMEOUT_SECONDS)
    require_equal_runs(corpus / out, corpus / "deepspeed")
    assert all((row["teacher_seconds"] > 0) != row["dense"] for row in rows(corpus / out))


PACKED = "data.pack_length=512"
"""Two samples of a micro-batch are one row."""


@pytest.mark.slow
def test_ragged_rows_make_the_run_of_padded_rows(pool: Pool, corpus: Path):
    """Also where the host's own rows hold several samples."""
    runs = [
        ("padded", train, "pipeline: 2", ()),
        ("ragged", train_with_own_attention, "pipeline: 2, row_format: ragged", ()),
        ("packed", train_with_own_attention, "pipeline: 2, row_format: ragged", (PACKED,)),
        ("packed, cut", train_with_own_attention, "tensor: 2, row_format: ragged", (PACKED,)),
    ]
    for out, kind, cut, more in runs:
        # Ragged rows fill their total, the others each row: neither has to here.
        settings = (f"parallel={{{cut}}}", "elision.token_multiple=1", *more)
        pool.run(2, kind, Run(corpus, out, settings), TIMEOUT_SECONDS)
        require_equal_runs(corpus / out, corpus / "padded")


@pytest.mark.slow
def test_context_ranks_cut_each_sample_of_a_packed_row(pool: Pool, corpus: Path):
    """Both runs fill up a micro-batch, which is one row, to a multiple of 4."""
    for out, cut in (("whole row", "tensor: 1"), ("cut row", "context: 2")):
        run = Run(corpus, out, (f"parallel={{{cut}, row_format: ragged}}", PACKED))
        pool.run(2 if "context" in cut else 1, train_with_own_attention, run, TIMEOUT_SECONDS)
    require_equal_runs(corpus / "cut row", corpus / "whole row")


def printed_plan(corpus: Path, world: int, *overrides: str) -> dict[str, str]:
    """The figures that `run.plan_only` prints for a job of so many ranks."""
    command = ("regate_ds.cli", "train", str(corpus / "run.yaml"), "run.plan_only=true")
    done = start(*command, *overrides, WORLD_SIZE=str(world))
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.slow
def test_the_plan_that_is_printed_is_what_the_run_keeps(pool: Pool, corpus: Path):
    """An epoch of sparse steps, whose rows are filled and cut as sequence parallelism needs it."""
    sparse = ("elision.schedule={warmup: 0, final_dense_share: 0}", "elision.token_multiple=3")
    common = (*sparse, "run.steps=null", "run.accumulation=2")
    parallel = "parallel={tensor: 2, sequence: true}"
    pool.run(2, train, Run(corpus, "epoch", (*common, parallel)), TIMEOUT_SECONDS)
    found = rows(corpus / "epoch")
    assert not any(row["dense"] for row in found)
    total = {key: sum(row[key] for row in found) for key in COUNTS}
    kept, padded = total["tokens_kept"], total["padded"]
    expected = {
        "kept_share_of_tokens": f"{kept / total['tokens_total']:.4f}",
        "kept_share_of_answer": f"{total['answer_kept'] / total['answer_total']:.4f}",
        "kept_share_of_image": f"{total['image_kept'] / total['image_total']:.4f}",
        "padding_share": f"{padded / (kept + padded):.4f}",
        "filled": str(total["filled"]),
        "steps": str(len(found)),
    }
    figures = printed_plan(corpus, 2, *common, parallel)
    assert {key: figures[key] for key in expected} == expected
    # Without sequence parallelism rows are multiples of 3, not of 6.
    other = printed_plan(corpus, 1, *common)
    assert other["filled"] != figures["filled"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Case(tp=2), Case(pp=2)], ids=str)
def test_a_rank_reads_its_own_part_of_the_students_weights(pool: Pool, corpus: Path, layout: Case):
    pool.run(layout.world, check_reading, Reading(corpus, layout))


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_never_stopped(pool: Pool, corpus: Path):
    parallel = "parallel={pipeline: 2, distributed_optimizer: true}"
    common = (parallel, "run.accumulation=2", "run.save_every=3")
    pool.run(4, train, Run(corpus, "whole", common), TIMEOUT_SECONDS)
    require_equal_runs(corpus / "whole", corpus / "deepspeed")
    pool.run(4, train, Run(corpus, "resumed", common, stop_after=4), TIMEOUT_SECONDS)
    pool.run(4, train, Run(corpus, "resumed", (*common, "run.resume=true")), TIMEOUT_SECONDS)
    whole, resumed = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows(corpus / name)]
        for name in ("whole", "resumed")
    )
    assert resumed == whole
    for name, weight in weights(corpus / "whole").items():
        assert torch.equal(weights(corpus / "resumed")[name], weight), name
    mine, theirs = (difficulty(corpus / name) for name in ("whole", "resumed"))
    assert len(mine) == 2
    assert any(values.any() for values in mine)
    assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.slow
def test_without_elision_the_run_is_megatrons_own_bit_for_bit(pool: Pool, corpus: Path):
    common = ("parallel.pipeline=2", "elision.enabled=false", "run.steps=2")
    pool.run(2, train, Run(corpus, "off", (*common, "optimizer.warmup_steps=3")), TIMEOUT_SECONDS)
    pool.run(
        2,
        train_plainly,
        Run(corpus, "plain", (*common, "optimizer.warmup_steps=3")),
        TIMEOUT_SECONDS,
    )
    for name, weight in weights(corpus / "plain").items():
        assert torch.equal(weights(corpus / "off")[name], weight), name
    assert [row["dense"] for row in rows(corpus / "off")] == [True, True]


@pytest.mark.slow
def test_the_command_trains_in_half_precision(corpus: Path):
    more = ("parallel={tensor: 1}", "run.precision=bf16", "model.freeze_vision=true")
    out = f"run.out={corpus / 'half'}"
    start("tests.recipe.engines.main_helper", "train", str(corpus / "run.yaml"), out, *more)
    found, wanted = rows(corpus / "half"), rows(corpus / "deepspeed")
    assert [row["answer_kept"] for row in found] == [row["answer_kept"] for row in wanted]
    assert [row["loss"] for row in found] == pytest.approx(
        [row["loss"] for row in wanted], rel=0.02
    )
    assert all(w.dtype == torch.bfloat16 for w in weights(corpus / "half").values())


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(pool: Pool, corpus: Path):
    """Saved on two tensor ranks, it becomes the run of one DeepSpeed rank under every other cut."""

    def cut(axes: str) -> str:
        return f"parallel={{{axes}, distributed_optimizer: true}}"

    saved = (cut("tensor: 2, sequence: true"), "run.save_every=3")
    pool.run(2, train, Run(corpus, "cut", saved, stop_after=4), TIMEOUT_SECONDS)
    others = {"stages": (cut("pipeline: 2, virtual: 2"),), "replicas": (cut("tensor: 1"), HALF)}
    for out, settings in others.items():
        shutil.copytree(corpus / "cut", corpus / out)
        more = (*settings, "run.save_every=3", "run.resume=true")
        pool.run(2, train, Run(corpus, out, more), TIMEOUT_SECONDS)
        require_equal_runs(corpus / out, corpus / "deepspeed")
    mine, theirs = (difficulty(corpus / name) for name in ("stages", "deepspeed"))
    assert theirs[0].any()
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-5, atol=1e-6)
