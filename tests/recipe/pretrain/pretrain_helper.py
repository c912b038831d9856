"""Small runs of `regate pretrain`, and checks of them that each rank's process makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from regate_ds.job.process import start_process
from regate_ds.recipe.pretrain.config import PretrainTree, load_pretrain
from regate_ds.recipe.pretrain.trainer import Pretraining

STEPS = 4
ENCODER = {
    "model_type": "bert",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
TREE = {
    "model": ENCODER,
    "data": {"length": 12, "vocab_size": 270, "held_out": 0.2},
    "optimizer": {"lr": 0.01, "grad_clip": 0.5},
    "run": {"steps": STEPS, "micro_batch": 2, "accumulation": 2, "precision": "fp32"},
}


class Killed(Exception):
    pass


class KilledPretraining(Pretraining):
    """Stops after step 3, as a lost machine would; step 2 was saved."""

    def _after(self, done: int, stop: Any) -> None:
        super()._after(done, stop)
        if done == 3:
            raise Killed


def make_data(folder: Path) -> None:
    """Text, and captions of very different lengths."""
    lines = [f"row {n}: {'abcdefghij'[n % 10] * (n % 4)} is the name of {n * n}" for n in range(60)]
    (folder / "text.txt").write_text("\n".join(lines))
    records = []
    for n in range(40):
        Image.new("RGB", (8, 8), (n * 6, 255 - n * 6, n)).save(folder / f"{n}.png")
        text = "so " * (n % 7) + f"shade {n}"
        records.append(json.dumps({"image": f"{n}.png", "text": text}))
    (folder / "captions.jsonl").write_text("\n".join(records))


def config_of(folder: Path, out: str, *overrides: str) -> PretrainTree:
    tree: dict[str, Any] = {name: {**section} for name, section in TREE.items()}
    tree["data"]["path"] = str(folder / "text.txt")
    tree["run"]["out"] = str(folder / out)
    path = folder / f"{out}-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_pretrain(path, overrides)


PICTURES = ["data.pictures=true", "data.patch=4", f"model={json.dumps(DECODER)}"]


def pictures(folder: Path, objective: str) -> list[str]:
    return [*PICTURES, f"data.path={folder / 'captions.jsonl'}", f"objective={objective}"]


def run(
    folder: Path, out: str, *overrides: str, kind: type[Pretraining] = Pretraining
) -> Pretraining:
    made = kind(config_of(folder, out, *overrides), start_process())
    made.run()
    return made


def metrics(folder: Path, out: str) -> list[dict[str, Any]]:
    """Metrics without the times."""
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    timed = {"step_seconds", "cpu_seconds"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def zero(stage: int) -> str:
    return f'run.deepspeed={{"zero_optimization": {{"stage": {stage}}}}}'


def check_two_ranks(rank: int, folder: str) -> None:
    root = Path(folder)
    run(root, "two")
    run(root, "two-zero-2", zero(2))
    with pytest.raises(Killed):
        run(root, "resumed", zero(2), "run.save_every=2", kind=KilledPretraining)
    run(root, "resumed", zero(2), "run.resume=true")
    assert metrics(root, "resumed") == metrics(root, "two-zero-2")
    ends = [load_file(root / out / "model/model.safetensors") for out in ("resumed", "two-zero-2")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    run(root, "two-pictures", *pictures(root, "free_language_modeling"))


def check_one_rank(rank: int, folder: str) -> None:
    root = Path(folder)
    run(root, "one", "run.micro_batch=8", "run.accumulation=1")
    all_in_one = ["run.micro_batch=8", "run.accumulation=1"]
    run(root, "one-pictures", *pictures(root, "free_language_modeling"), *all_in_one)
    run(root, "one-choice", "objective=multi_choice", "run.precision=bf16")
    with pytest.raises(ValueError, match="the run had 2 ranks, which hold parts"):
        run(root, "resumed", zero(2), "run.resume=true", "run.accumulation=4")
