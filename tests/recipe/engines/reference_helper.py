"""A small corpus, its reference losses, and its run on DeepSpeed: what `parallel` must reproduce.

``python -m tests.recipe.engines.reference_helper FOLDER DECODER KEY=VALUE ...``, a process of its
own, without the shim.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from regate_ds.job.process import start_process
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.trainer import Trainer
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.precompute import TeacherJob, precompute
from regate_ds.teacher.scoring import score_samples
from tests.support.small_corpus import TEXT, make_corpus

STEPS = 6
"""Two dense, three sparse, one dense; the second epoch begins before the last."""


DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
}


def make(folder: Path, decoder: str) -> None:
    make_corpus(folder, text={**TEXT, "num_hidden_layers": 4, **DECODERS[decoder]})
    path = folder / "run.yaml"
    config = yaml.safe_load(path.read_text())
    # Filled up to a multiple of what sequence and context parallelism need.
    schedule = {"warmup": 2, "final_dense_share": 0.16}
    config["elision"] = {"schedule": schedule, "token_multiple": 4}
    config["optimizer"] |= {"weight_decay": 0.1, "warmup_steps": 3, "schedule": "cosine"}
    config["run"] |= {"steps": STEPS, "accumulation": 4, "save_every": 0, "deepspeed": None}
    path.write_text(yaml.safe_dump(config))


def main(folder: Path, decoder: str, *overrides: str) -> None:
    make(folder, decoder)
    # Without ZeRO the engine tells no norm of the gradient.
    zero = "run.deepspeed={zero_optimization: {stage: 1}}"
    config = load_config(folder / "run.yaml", [f"run.out={folder / 'deepspeed'}", zero, *overrides])
    process, corpus = start_process(), load_corpus(config)
    pad_id = corpus.student.pad_id
    assert config.teacher.store is not None
    job = TeacherJob(
        index=corpus.index,
        encode=corpus.train.encode,
        score=partial(score_samples, text_backbone(corpus.student.model), pad_id=pad_id),
        teacher_id="its own backbone",
        store=config.teacher.store,
        tokens_per_batch=config.teacher.tokens_per_batch,
    )
    precompute(job, process.group, process.device)
    Trainer(config, corpus, process).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
