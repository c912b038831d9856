"""What a trainer with a command line of its own is given: models and conversations in a folder."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor, TrainerCallback

from regate_ds.adapters.trainers.scored import Scored
from regate_ds.teacher.backbone import text_backbone
from tests.adapters.trainers.sft_helper import answer, oracle, question
from tests.house.test_docs import blocks
from tests.support.measure import Gradients, assert_gradients_equal
from tests.support.paths import ROOT
from tests.support.planning import config_of
from tests.support.tiny_students import CLIP, make_image, make_llava

NUM_SAMPLES = 8
WARM = {"warmup": 0, "final_dense_share": 0.0}


def save_text(folder: Path, chat_template: str | None = None) -> Path:
    student = make_llava(max_position_embeddings=512)
    student.tokenizer.chat_template = chat_template
    copy.deepcopy(text_backbone(student.model)).save_pretrained(folder / "text")
    student.tokenizer.save_pretrained(folder / "text")
    return folder / "text"


def save_llava(folder: Path, chat_template: str | None = None) -> Path:
    student = make_llava(max_position_embeddings=512)
    student.model.save_pretrained(folder / "llava")
    LlavaProcessor(
        student.vision.processor,
        student.tokenizer,
        patch_size=CLIP["patch_size"],
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "llava")
    return folder / "llava"


def save_talks(folder: Path, images: bool, blind: tuple[int, ...] = ()) -> Path:
    """Conversations as both hosts read them; ``blind``: the numbers of those without an image."""
    rows = []
    for number in range(NUM_SAMPLES):
        sees = images and number not in blind
        asked = f"<image> {question(number)}" if sees else question(number)
        turns = (("user", asked), ("assistant", answer(number)))
        row: dict[str, Any] = {"messages": [{"role": r, "content": text} for r, text in turns]}
        if images:
            path = folder / f"{number}.png"
            make_image(seed=number).save(path)
            row["images"] = [str(path)] if sees else []
        rows.append(row)
    path = folder / ("seen.json" if images else "read.json")
    path.write_text(json.dumps(rows))
    return path


class Watched:
    """Put before a trainer: it keeps the model as it was, and the micro-batches as they came."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        type(self).last = self
        self.exact = copy.deepcopy(self.model).double()
        self.add_callback(KeepGradient(self))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        self.seen = [next(epoch_iterator) for _ in range(num_batches)]
        return super().get_batch_samples(iter(self.seen), num_batches, device)


class KeepGradient(TrainerCallback):
    """What the optimizer is given at the last step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
        named = self._trainer.model.named_parameters()
        self._trainer.gradient = {n: p.grad.clone() for n, p in named if p.grad is not None}


def regate(folder: Path, **knobs: Any) -> dict[str, Any]:
    return {"regate": config_of(**WARM, **knobs), "reference": Scored(folder / "store")}


def assert_oracles_step(trainer: Any) -> None:
    """The loss and the gradients of the first step are those of the oracle."""
    plan = trainer.regate.plan
    assert not trainer.regate.metrics()["dense"]
    loss, wanted = oracle(trainer.exact, list(zip(trainer.seen, plan.micro, strict=True)))
    found: Gradients = trainer.gradient
    assert_gradients_equal(found, wanted, 1e-5)
    logged = trainer.state.log_history[0]["loss"]
    assert abs(logged - loss) <= 1e-5 * loss, (logged, loss)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_same_run(found: Any, wanted: Any, num_steps: int) -> None:
    """Two trainers ended alike, bit for bit, by what they logged and by their weights."""
    assert losses(found) == losses(wanted)
    assert len(losses(wanted)) == num_steps
    weights = dict(found.model.named_parameters())
    for name, weight in wanted.model.named_parameters():
        assert torch.equal(weights[name], weight), name


def run_page(page: Path, folder: Path) -> list[dict[str, Any]]:
    """Do what a page says in a folder; return the steps that were logged.

    Its Python block is written into the file that its first line names, and so is one of YAML;
    the indented block is the command.
    """
    for block, _ in blocks(page):
        first, _, rest = block.partition("\n")
        if first.startswith("# "):
            (folder / first[2:]).write_text(rest + "\n")
        elif not first.startswith("pip"):
            (command,) = (block,)
    run(command, folder)
    ((state),) = sorted(folder.glob("out/**/checkpoint-*/trainer_state.json"))[-1:]
    return [row for row in json.loads(state.read_text())["log_history"] if "loss" in row]


def run(command: str, folder: Path, **more: str) -> None:
    """Run a command of the page by this environment's programs; ``more``: of the environment."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    line = " ".join(part.strip() for part in command.split("\\\n"))
    done = subprocess.run(line.split(), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
