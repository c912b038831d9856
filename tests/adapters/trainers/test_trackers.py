"""What the method tells a Trainer's and an Accelerator's trackers, read back from TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from regate_ds import Keyed, Teacher, attach
from regate_ds.adapters.trainers.hf_trainer import RegateTrainer
from regate_ds.adapters.trainers.logged import SinceLog
from regate_ds.adapters.trainers.scored import Scored
from tests.adapters.torch.runs_helper import Items, collate, reference
from tests.adapters.trainers.plain_trainer_helper import settings
from tests.house.test_docs import blocks
from tests.support.models import causal_lm
from tests.support.paths import ROOT
from tests.support.planning import config_of

HALF_DENSE = {"warmup": 2, "final_dense_share": 0.0}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each curve of TensorBoard's event files: (step, value)."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(each.step, each.value) for each in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


class Counted(RegateTrainer):
    """Keeps each step's counts, as a callback of the user's own would."""

    def get_batch_samples(self, *args: Any) -> Any:
        found = super().get_batch_samples(*args)
        self.counts = [*getattr(self, "counts", []), self.regate.metrics()]
        return found


def test_a_trainers_curves_have_the_shares_of_the_steps_since_the_last_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    trainer = Counted(
        model=causal_lm(),
        args=settings(tmp_path, max_steps=4, logging_steps=2, report_to=["tensorboard"]),
        train_dataset=Keyed(Items(), "mine"),
        data_collator=collate,
        regate=config_of(**HALF_DENSE),
        reference=Scored(tmp_path / "store", Teacher(model=causal_lm(), pad_id=0)),
    )
    trainer.train()
    curves = scalars(tmp_path / "curves")
    sums = [
        {name: a[name] + b[name] for name in a} for a, b in (trainer.counts[:2], trainer.counts[2:])
    ]
    for name, kind in (("kept_share", "tokens"), ("answer_kept_share", "answer")):
        wanted = [(2 * n, s[f"{kind}_kept"] / s[f"{kind}_total"]) for n, s in enumerate(sums, 1)]
        assert curves[f"train/regate/{name}"] == [
            (step, pytest.approx(share)) for step, share in wanted
        ]
        assert wanted[0][1] == 1.0 > wanted[1][1] > 0
    kept = [(2 * n, s["answer_kept"] / 2) for n, s in enumerate(sums, 1)]
    assert curves["train/regate/answer_kept"] == kept
    assert all(seconds > 0 for _, seconds in curves["train/regate/step_seconds"])
    ((step, seconds),) = curves["train/regate/teacher_store_seconds"]
    assert step == 2
    assert seconds > 0
    # Texts have no images, and a store no teacher in the run.
    assert "train/regate/image_kept_share" not in curves
    assert "train/regate/teacher_seconds" not in curves


def test_a_log_has_what_is_said_once_and_means_of_what_each_step_says():
    since = SinceLog()
    since.add_once("teacher_store_seconds", 7.0)
    counts = dict.fromkeys(("tokens_total", "answer_total", "image_total"), 8)
    for kept, seconds in ((8, 1.0), (4, 2.0)):
        each = {"tokens_kept": kept, "answer_kept": 2, "image_kept": 6, "teacher_seconds": seconds}
        since.add({"dense": False, **counts, **each})
    assert since.take() == {
        "regate/kept_share": 0.75,
        "regate/answer_kept_share": 0.25,
        "regate/image_kept_share": 0.75,
        "regate/tokens_kept": 6.0,
        "regate/answer_kept": 2.0,
        "regate/image_kept": 6.0,
        "regate/teacher_seconds": 1.5,
        "regate/teacher_store_seconds": 7.0,
    }
    assert since.take() == {}


def test_an_accelerators_curves_are_the_metrics_and_the_figures(tmp_path: Path):
    page = ROOT / "docs" / "accelerate_loop.md"
    (line,) = (block for block, _ in blocks(page) if "accelerator.log(" in block)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("curves")
    model = causal_lm()
    regate = attach(model, config_of(**HALF_DENSE), total_steps=4, reference=reference())
    loader = DataLoader(Keyed(Items(4), "mine"), collate_fn=regate.collate(collate))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    counts = []
    assert regate.figures() == {}
    for window in regate.windows(loader, accelerator):
        for batch in window:
            accelerator.backward(regate.loss(model(**batch)))
            optimizer.step()
        regate.step(applied=True)
        exec(line, {"accelerator": accelerator, "regate": regate})
        counts.append(regate.metrics())
    accelerator.end_training()
    curves = scalars(tmp_path / "curves")
    for name in ("answer_kept", "answer_total", "dense", "padded"):
        assert curves[name] == [(row["step"], row[name]) for row in counts]
    shares = [row["tokens_kept"] / row["tokens_total"] for row in counts]
    assert [share for _, share in curves["kept_share"]] == pytest.approx(shares)
    assert all(seconds > 0 for _, seconds in curves["step_seconds"])
