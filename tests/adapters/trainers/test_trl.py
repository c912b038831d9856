"""TRL's SFTTrainer with ReGATE, against the per-layer oracle and against TRL alone."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from trl.trainer import sft_trainer

from regate_ds.adapters.trainers.trl_sft import RegateSFTTrainer, is_fused_forward
from tests.adapters.trainers.trl_helper import (
    CASES,
    OwnLossWithRegate,
    check_off,
    check_resumed,
    check_step,
    refused,
)
from tests.adapters.trainers.trl_page_helper import OFF, ON, diff, run_page, save_processor
from tests.support.paths import ROOT
from tests.support.small_corpus import make_corpus


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CI", "1")


@pytest.mark.parametrize("name", CASES)
def test_a_sparse_step_has_the_oracles_loss_gradients_and_figures(name: str, tmp_path: Path):
    check_step(CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["assistant only", "packing, LoRA", "images, assistant only"])
def test_switched_off_it_is_trls_own_run_bit_for_bit(name: str, tmp_path: Path):
    check_off(CASES[name], tmp_path)


def test_a_resumed_run_is_the_run(tmp_path: Path):
    check_resumed(CASES["packing"], tmp_path)


def test_evaluation_and_removal_give_back_trls_own_forward(tmp_path: Path):
    case = CASES["LoRA"]
    data = {"eval_dataset": case.data()}
    trainer = RegateSFTTrainer(**case.given(tmp_path), **data, **case.regate(tmp_path))
    host = trainer.model.get_base_model()
    assert not is_fused_forward(vars(host)["forward"])
    attached = trainer.evaluate()
    trainer.regate.remove()
    assert is_fused_forward(vars(host)["forward"])
    removed = trainer.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert attached[name] == removed[name] > 0


def test_the_page_runs_as_it_stands_and_off_is_the_script_before(tmp_path: Path):
    before, off = (run_page(gone, tmp_path, OFF).model.state_dict() for gone in "+-")
    after = run_page("-", tmp_path, ON)
    assert all(torch.equal(off[name], weight) for name, weight in before.items())
    assert not torch.equal(after.model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    assert not after.regate.metrics()["dense"]
    assert len([line for line in diff() if line.startswith("+")]) == 3


def test_the_example_trains_a_vlm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_corpus(tmp_path, num_train=8, num_test=1)
    save_processor(tmp_path / "student")
    monkeypatch.syspath_prepend(ROOT / "launch" / "examples")
    import trl_sft_vlm

    given = [str(tmp_path / name) for name in ("student", "data/train.json", "out")]
    counts = trl_sft_vlm.main(given).regate.metrics()
    assert counts["step"] == 3
    assert counts["image_total"] > 0
    dense = trl_sft_vlm.main([*given, "--dense"])
    assert [row["step"] for row in dense.state.log_history if "entropy" in row] == [1, 2, 3, 4]


def test_what_cannot_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # TRL's own needs an accelerator.
    offloading = lambda model: nullcontext()  # noqa: E731
    monkeypatch.setattr(sft_trainer, "get_act_offloading_ctx_manager", offloading)
    text, images = CASES["assistant only"], CASES["images, assistant only"]
    stream = {"train_dataset": text.data().to_iterable_dataset()}
    for message, case, given, knobs in (
        ("loss_type='dft'", text, {}, {"loss_type": "dft"}),
        ("activation_offloading=True", text, {}, {"activation_offloading": True}),
        ("label_smoothing_factor=0.1", text, {}, {"label_smoothing_factor": 0.1}),
        ("router_aux_loss_coef=0.001", text, {"model": experts()}, {}),
        ("train_dataset=IterableDataset, which does not name its samples", text, stream, {}),
        ("a compute_loss of your own", text, {"kind": OwnLossWithRegate}, {}),
        ("Packing is not supported for vision", images, {}, {"packing": True}),
    ):
        kind = given.pop("kind", RegateSFTTrainer)
        assert message in refused(case, tmp_path, given, kind, **knobs)


def experts() -> MixtralForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_local_experts=2))
