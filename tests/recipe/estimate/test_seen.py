"""What is told of a run's steps against what was seen of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.cost.flops import RowCounts
from regate_ds.recipe.bench.arms import ARMS
from regate_ds.recipe.bench.case import StepCase, make_data
from regate_ds.recipe.bench.measures import LiveBytes
from regate_ds.recipe.estimate.activations import activations_of
from regate_ds.recipe.estimate.seen import means, rows_by_kind
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.support.models import VOCABULARY, llava, qwen2_vl

CASE = StepCase(hidden=64, layers=4, tokens=128, samples=4, vocabulary=VOCABULARY - 2)


def peak_and_told(model: nn.Module, name: str) -> tuple[int, float]:
    """The peak of live bytes of one step, whose images are already embedded, and what is told."""
    arm, data = ARMS[name], make_data(CASE)
    config, (batch,) = arm.config(CASE), data.batches
    stores = Stores(data, DifficultyStore(data.index))
    (micro,) = Regate(config, stores, total_steps=100).plan_step([batch.tokens]).micro
    attachment, live = attach_model(model, config), LiveBytes()
    with live:
        model(**batch.inputs, regate_plan=micro).loss_sum.backward()
    model.zero_grad(set_to_none=True)
    attachment.remove()
    rows = RowCounts(
        count=CASE.samples,
        length=micro.num_tokens,
        slots=micro.num_slots,
        kept=micro.num_kept,
        num_targets=micro.num_targets,
    )
    spans = () if name == "ours_dense" else arm.spans(CASE)
    return live.peak, activations_of(model, rows, spans, torch.float32, recompute=False).total


@pytest.mark.parametrize("make", [llava, qwen2_vl])
def test_memory_ratios_of_multimodal_decoders_are_those_of_live_bytes_to_a_tenth(make):
    model = make(num_layers=CASE.layers)
    peak, told = peak_and_told(model, "ours_dense")
    assert told == pytest.approx(peak, rel=0.1)
    for name in ("elide_1", "images_0"):
        own_peak, own_told = peak_and_told(model, name)
        # Seen: within .01.
        assert own_told / told == pytest.approx(own_peak / peak, rel=0.1), name


def write_metrics(folder: Path, *kinds: bool) -> None:
    rows = [
        {"step": step, "dense": dense, "step_seconds": 4.0, "cpu_seconds": 8.0, "flops": 10 + step}
        for step, dense in enumerate(kinds)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_of_a_run_are_averaged_by_kind(tmp_path: Path):
    write_metrics(tmp_path, True, False, True, False)
    rows = rows_by_kind(tmp_path)
    assert [row["step"] for row in rows["sparse"]] == [1, 3]
    seen = means(rows)
    assert seen["flops"] == {"dense": 11.0, "sparse": 12.0}
    assert seen["cpu_seconds"] == {"dense": 8.0, "sparse": 8.0}


@pytest.mark.parametrize(("kinds", "message"), [((True, True), "none is sparse"), ((), "0 steps")])
def test_a_run_without_steps_of_both_kinds_is_refused(tmp_path: Path, kinds, message):
    write_metrics(tmp_path, *kinds)
    with pytest.raises(ValueError, match=message):
        rows_by_kind(tmp_path)


def test_a_run_of_an_older_version_is_refused(tmp_path: Path):
    row = {"step": 0, "dense": True, "step_seconds": 4.0, "cpu_seconds": 8.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="its metrics have no flops, so an older version made"):
        rows_by_kind(tmp_path)
