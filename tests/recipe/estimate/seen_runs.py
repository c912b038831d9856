"""What `regate estimate` tells beside what runs take: dense and sparse steps take turns.

python -m tests.recipe.estimate.seen_runs FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from regate_ds.adapters.megatron_on_cpu.shim import install
from regate_ds.recipe.config.tree import RunConfig, load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.estimate.forecast import Machine
from regate_ds.recipe.estimate.gpus import GPUS
from regate_ds.recipe.estimate.report import report_of
from regate_ds.recipe.students.qwen2_vl import build_qwen2_vl
from regate_ds.recipe.students.student import save_student
from regate_ds.recipe.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.small_corpus import TEXT, make_corpus

STEPS = 16
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
GRID = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 6, "spatial_merge_size": 2}

COMMON = (
    "model.freeze_vision=true",
    "data.test=null",
    "elision.score=random",
    "elision.schedule={warmup: 0, cycle_steps: 2, cycle_dense_steps: 1, final_dense_share: 0.0}",
    "run.micro_batch=8",
    "run.accumulation=1",
    "run.save_every=0",
)

RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "LLaVA": (1, ("run.deepspeed={zero_optimization: {stage: 0}}",)),
    "Qwen2-VL": (1, ("model.path={folder}/qwen", "run.deepspeed={zero_optimization: {stage: 0}}")),
    "LLaVA, Megatron TP 2": (2, ("parallel={tensor: 2, sequence: true}", "run.deepspeed=null")),
}
"""Ranks, and what a run's configuration has beside COMMON."""


def make(folder: Path) -> None:
    text = {**TEXT, **WIDE}
    make_corpus(folder, num_train=8 * STEPS, num_test=2, text=text)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    vision = {**GRID, "mlp_ratio": 2, "max_pixels": 48 * 48}
    text = {**text, "rope_parameters": ROPE}
    save_student(build_qwen2_vl(tokenizer, text=text, vision=vision, seed=0), folder / "qwen")


def config_of(folder: Path, name: str) -> RunConfig:
    own = [each.replace("{folder}", str(folder)) for each in RUNS[name][1]]
    out = [f"run.out={folder / name.replace(' ', '-')}", f"run.steps={STEPS}"]
    return load_config(folder / "run.yaml", [*COMMON, *own, *out])


def run(rank: int, folder: str, name: str) -> None:
    if "Megatron" in name:
        install()
    from regate_ds.job.process import start_process

    config = config_of(Path(folder), name)
    Trainer(config, load_corpus(config), start_process()).run()


def main(folder: Path) -> None:
    make(folder)
    print(
        "| run | seconds: told, seen | CPU seconds | FLOPs: told, seen |\n| --- | --- | --- | --- |"
    )
    for name, (ranks, _) in RUNS.items():
        run_ranks(run, ranks, str(folder), name, timeout=1500)
        config = config_of(folder, name)
        run_yaml, machine = config.run.out / "config.yaml", Machine(GPUS["h100"], ranks, 0.4)
        seen = report_of(run_yaml, (), machine, (), config.run.out)["seen"]
        told = {key: of["sparse"] / of["dense"] for key, of in seen.pop("told").items()}
        ratio = {key: of["sparse"] / of["dense"] for key, of in seen.items()}
        print(
            f"| {name} | {told['seconds']:.3f}, {ratio['step_seconds']:.3f} | "
            f"{ratio['cpu_seconds']:.3f} | {told['flops']:.3f}, {ratio['flops']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
