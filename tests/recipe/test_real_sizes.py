"""The named runs at the paper's sizes: a student on meta tensors, and a plan of small data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.estimate.plan_walk import walk_plan
from regate_ds.recipe.preflight import judge_run
from regate_ds.recipe.tasks.digits.scenes import build_digits
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from tests.support.paths import ROOT
from tests.support.planning import gate_layers

CONFIGS = ROOT / "configs"

LAYER_BILLIONS = {
    "videollama2_7b": 6.53,
    "videochat2_7b_lora": 6.98,
    "internvl3_5_8b": 6.95,
    "internvl3_5_8b_megatron": 6.95,
}
"""Weights of the decoder's layers: of Qwen2-7B, Mistral-7B and Qwen3-8B without its norms."""

TOWER_MILLIONS = 304
RANKS = dict(zip(LAYER_BILLIONS, (4, 4, 16, 16)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    build_digits(folder, num_train=32, num_test=1, seed=0)
    records = json.loads((folder / "train.json").read_text())
    texts = [part["value"] for record in records for part in record["conversations"]]
    train_tokenizer(texts, vocab_size=400).save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("name", LAYER_BILLIONS)
def test_a_named_run_has_the_paper_s_size_and_a_plan(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", str(RANKS[name]))
    overrides = [f"model.tokenizer={folder / 'tokenizer'}", f"data.train={folder / 'train.json'}"]
    # The kernel is needed where the model runs, not for its shapes.
    small = ["run.accumulation=1", "run.steps=600", "model.attn_implementation=sdpa"]
    overrides += [*small, "run.plan_only=true"]
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    judge_run(config)
    corpus = load_corpus(config, weights=False)
    model: Any = corpus.student.model
    assert all(parameter.is_meta for parameter in model.parameters())
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    assert layers / 1e9 == pytest.approx(LAYER_BILLIONS[name], abs=0.01)
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    assert tower / 1e6 == pytest.approx(TOWER_MILLIONS, abs=2)
    figures = walk_plan(config, corpus)
    assert figures["steps"] == 600
    assert 0.5 <= figures["kept_share_of_answer"] < 0.7
    gate_layers(model, first_layer=config.elision.first_layer).remove()
