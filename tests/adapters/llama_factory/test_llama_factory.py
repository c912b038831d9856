"""LLaMA-Factory with ReGATE, by its own ``run_exp``: `make test-llamafactory` runs it.

It needs an environment of its own, with older versions of transformers and trl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.trainers.cli_helper import (
    Watched,
    assert_oracles_step,
    assert_same_run,
    regate,
    run_page,
    save_llava,
    save_talks,
    save_text,
)
from tests.support.paths import ROOT

pytest.importorskip("llamafactory", reason="needs LLaMA-Factory: make test-llamafactory")

from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import run_exp

from regate_ds import RegateConfig, Scored
from regate_ds.adapters.trainers import llama_factory
from regate_ds.adapters.trainers.llama_factory import (
    RegateFactoryTrainer,
    installed_in_llama_factory,
)

STEPS, SAVED_AFTER = 3, 2


class WatchedPlain(Watched, CustomSeq2SeqTrainer):
    last: Any


class WatchedRegate(Watched, RegateFactoryTrainer):
    last: Any


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_factory, "RegateFactoryTrainer", WatchedRegate)


def job(folder: Path, *, images: bool = False, **more: Any) -> dict[str, Any]:
    """What a user's YAML would say."""
    blind = (1, 3) if images else ()
    model, data = folder / ("llava" if images else "text"), save_talks(folder, images, blind)
    if not model.exists():
        (save_llava if images else save_text)(folder)
    describe(folder, data, images=images)
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "dataset": "talks",
        "dataset_dir": str(folder),
        "template": "llava" if images else "vicuna",
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **more,
    }


def describe(folder: Path, data: Path, *, images: bool) -> None:
    """LLaMA-Factory's list of data sets."""
    columns = {"messages": "messages", **({"images": "images"} if images else {})}
    roles = {"user_tag": "user", "assistant_tag": "assistant"}
    tags = {"role_tag": "role", "content_tag": "content", **roles}
    entry = {"file_name": data.name, "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"talks": entry}))


def trained(arguments: dict[str, Any], **given: Any) -> Any:
    with installed_in_llama_factory(**given):
        run_exp(dict(arguments))
    return WatchedRegate.last


CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "text, LoRA": {"finetuning_type": "lora"},
    "images, LoRA": {"images": True, "finetuning_type": "lora"},
    "images": {"images": True},
    # The first batch with words alone has LLaMA-Factory's own empty image in it.
    "images, one sample a batch": {
        "images": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "disable_shuffling": True,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_sparse_step_has_the_oracles_loss_and_gradients(name: str, tmp_path: Path):
    knobs = {"images.keep_share": 0.5} if "images" in CASES[name] else {}
    trainer = trained(job(tmp_path, **CASES[name]), **regate(tmp_path, **knobs))
    assert_oracles_step(trainer)
    counts = trainer.regate.metrics()
    assert (0 < counts["image_kept"] < counts["image_total"]) == bool(knobs)
    assert workflow.CustomSeq2SeqTrainer is CustomSeq2SeqTrainer


@pytest.mark.parametrize("images", [False, True])
def test_switched_off_it_is_llama_factorys_own_run_bit_for_bit(
    images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = job(tmp_path, images=images, max_steps=STEPS)
    off = trained(arguments, regate=RegateConfig(enabled=False))
    monkeypatch.setattr(workflow, "CustomSeq2SeqTrainer", WatchedPlain)
    run_exp({**arguments, "output_dir": str(tmp_path / "plain")})
    assert_same_run(off, WatchedPlain.last, STEPS)


def test_a_resumed_run_is_the_run(tmp_path: Path):
    saves = {"save_strategy": "steps", "save_steps": SAVED_AFTER}
    # Of LLaVA's weights alone transformers 5.6.0 itself loads nothing back.
    arguments = job(tmp_path, images=True, finetuning_type="lora", max_steps=STEPS, **saves)
    run = trained(arguments, **regate(tmp_path))
    checkpoint = str(tmp_path / "out" / f"checkpoint-{SAVED_AFTER}")
    resumed = trained({**arguments, "resume_from_checkpoint": checkpoint}, **regate(tmp_path))
    assert_same_run(resumed, run, STEPS)
    assert resumed.regate.metrics() == run.regate.metrics()
    assert not run.regate.metrics()["dense"]


def test_an_online_teacher_scores_the_steps(tmp_path: Path):
    given = regate(tmp_path)
    cached = trained(job(tmp_path), **given)
    teacher = teacher_of(tmp_path)
    again = job(tmp_path, output_dir=str(tmp_path / "online"))
    online = trained(again, regate=given["regate"], reference=teacher.online())
    assert_same_run(online, cached, 1)
    assert online.regate.metrics()["teacher_seconds"] > 0


def teacher_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regate_ds import Teacher

    model = AutoModelForCausalLM.from_pretrained(folder / "text")
    tokenizer = AutoTokenizer.from_pretrained(folder / "text")
    return Teacher(model=model.eval(), pad_id=tokenizer.pad_token_id)


def test_the_page_runs_as_it_stands(tmp_path: Path):
    save_llava(tmp_path).rename(tmp_path / "student")
    (tmp_path / "data").mkdir()
    describe(tmp_path / "data", save_talks(tmp_path / "data", True), images=True)
    rows = run_page(ROOT / "docs" / "llamafactory.md", tmp_path)
    shares = [row["regate/answer_kept_share"] for row in rows]
    assert 0 < min(shares) < 1 == max(shares)


REFUSED: dict[str, dict[str, Any]] = {
    "stage='pt', whose trainer is another": {"stage": "pt"},
    "use_dft_loss=True, a loss that": {"use_dft_loss": True},
    "use_eaft_loss=True, a loss that": {"use_eaft_loss": True},
    "use_asft_loss=True, a loss that": {"use_asft_loss": True},
    "neat_packing=True, whose mask": {"neat_packing": True, "packing": True},
    "shift_attn=True, which replaces": {"shift_attn": True},
    "streaming=True, whose samples have no numbers": {"streaming": True},
    "label_smoothing_factor=0.1": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^elision in [^\n]+$") as caught:
        trained(job(tmp_path, **REFUSED[message]), regate=RegateConfig(keep_share=1.0))
    assert message in str(caught.value)
    assert workflow.CustomSeq2SeqTrainer is CustomSeq2SeqTrainer


def test_rays_workers_and_a_second_installation_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = RegateConfig(keep_share=1.0)
    with (
        installed_in_llama_factory(config, reference=Scored(tmp_path)),
        pytest.raises(RuntimeError, match="replaced already"),
        installed_in_llama_factory(config),
    ):
        pass
    monkeypatch.setenv("USE_RAY", "1")
    with pytest.raises(ValueError, match="USE_RAY=1, whose workers"):
        trained(job(tmp_path), regate=config)
