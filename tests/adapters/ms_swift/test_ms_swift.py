"""ms-swift with ReGATE, by its own ``swift sft``: `make test-swift` runs it.

It needs an environment of its own, with older versions of transformers and trl.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.trainers.cli_helper import (
    Watched,
    assert_oracles_step,
    assert_same_run,
    regate,
    run,
    run_page,
    save_llava,
    save_talks,
    save_text,
)
from tests.families.zoo.oracle import oracle_loss
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.paths import ROOT

pytest.importorskip("swift.pipelines", reason="needs ms-swift: make test-swift")

from swift.pipelines import sft_main
from swift.template.templates.internvl import InternvlTemplate
from swift.template.templates.qwen import Qwen3VLTemplate
from swift.trainers import Seq2SeqTrainer, TrainerFactory
from transformers import AutoModelForImageTextToText

from regate_ds import RegateConfig
from regate_ds.adapters.trainers import ms_swift
from regate_ds.adapters.trainers.ms_swift import RegateSwiftTrainer, install_in_swift
from regate_ds.job.deepspeed_launcher import free_port
from tests.adapters.ms_swift.qwen_helper import CLASSES, save_qwen

STEPS, SAVED_AFTER = 3, 2
PLUGIN = """
from regate_ds import Scored
from regate_ds.adapters.trainers.ms_swift import install_in_swift
from tests.adapters.trainers.cli_helper import WARM
from tests.support.planning import config_of

regate = config_of(**WARM, **{"images.keep_share": 0.5})
install_in_swift(regate, reference=Scored("reference"))
"""


class WatchedPlain(Watched, Seq2SeqTrainer):
    last: Any


class WatchedRegate(Watched, RegateSwiftTrainer):
    last: Any


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ms_swift, "RegateSwiftTrainer", WatchedRegate)
    monkeypatch.setattr(ms_swift, "make_trainer", None)
    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))


def command(folder: Path, images: bool = False, **more: Any) -> list[str]:
    """What a user would write behind ``swift sft``."""
    model, data = folder / ("llava" if images else "text"), save_talks(folder, images, (1, 3))
    if not model.exists():
        (save_llava if images else save_text)(folder)
    given = {
        "model": model,
        "model_type": "llava1_5_hf" if images else "llama",
        "template": "llava1_5_hf" if images else "llama",
        "dataset": data,
        "output_dir": folder / "out",
        "add_version": False,
        "split_dataset_ratio": 0,
        "load_from_cache_file": False,
        "check_model": False,
        "tuner_type": "full",
        "freeze_vit": False,
        "freeze_aligner": False,
        "torch_dtype": "float32",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        # Its dropout is drawn anew by the oracle.
        "lora_dropout": 0.0,
        **more,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def trained(words: list[str], **given: Any) -> Any:
    ms_swift.make_trainer = None
    install_in_swift(**given)
    sft_main(words)
    return WatchedRegate.last


CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "text, LoRA": {"tuner_type": "lora"},
    "images, LoRA": {"images": True, "tuner_type": "lora"},
    "images": {"images": True},
    "images, one sample a batch": {
        "images": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "train_dataloader_shuffle": False,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_sparse_step_has_the_oracles_loss_and_gradients(name: str, tmp_path: Path):
    knobs = {"images.keep_share": 0.5} if "images" in CASES[name] else {}
    trainer = trained(command(tmp_path, **CASES[name]), **regate(tmp_path, **knobs))
    assert_oracles_step(trainer)
    counts = trainer.regate.metrics()
    assert (0 < counts["image_kept"] < counts["image_total"]) == bool(knobs)


def assert_step_of_the_hosts_layers(trainer: Any, exact: Any) -> None:
    """As ``assert_oracles_step``, by the oracle that takes any decoder; without adapters."""
    plan, total = trainer.regate.plan, 0.0
    gated = range(1, exact.config.text_config.num_hidden_layers)
    for batch, own in zip(trainer.seen, plan.micro, strict=True):
        inputs = {k: v for k, v in batch.inputs.items() if k not in ("labels", "text_position_ids")}
        total = total + oracle_loss(exact, inputs, own, gated)
    loss = total / sum(own.num_targets for own in plan.micro)
    loss.backward()
    assert_gradients_equal(trainer.gradient, gradients(exact), 1e-5)


@pytest.mark.parametrize(
    ("name", "more"),
    [(name, more) for name in CLASSES for more in ("full", "one sample a batch")]
    + [("qwen2_vl", "lora"), ("qwen2_5_vl", "lora")],
)
def test_a_sparse_step_of_qwen_vl_has_the_oracles_loss_and_gradients(
    name: str, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = CASES["images, one sample a batch"] if more.startswith("one") else {"images": True}
    student = save_qwen(name, tmp_path / "llava", monkeypatch)
    before = AutoModelForImageTextToText.from_pretrained(student).double()
    words = command(tmp_path, **{**given, "model_type": name, "template": name})
    words += ["--tuner_type", "lora"] if more == "lora" else []
    trainer = trained(words, **regate(tmp_path, **{"images.keep_share": 0.5}))
    assert trainer.model.config.model_type == name
    if name == "qwen3_vl":
        assert_step_of_the_hosts_layers(trainer, before)
    else:
        assert_oracles_step(trainer)
    counts = trainer.regate.metrics()
    assert 0 < counts["image_kept"] < counts["image_total"]


@pytest.mark.parametrize("kind", ["text", "llava", "qwen2_5_vl", "qwen3_vl"])
def test_switched_off_it_is_swifts_own_run_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = {}
    if kind in CLASSES:
        save_qwen(kind, tmp_path / "llava", monkeypatch)
        more = {"model_type": kind, "template": kind}
    words = command(tmp_path, kind != "text", max_steps=STEPS, **more)
    off = trained(words, regate=RegateConfig(enabled=False))
    own = f"{WatchedPlain.__module__}.WatchedPlain"
    monkeypatch.setitem(TrainerFactory.TRAINER_MAPPING, "causal_lm", own)
    sft_main(words)
    assert_same_run(off, WatchedPlain.last, STEPS)


def test_a_resumed_run_is_the_run(tmp_path: Path):
    saves = {"save_strategy": "steps", "save_steps": SAVED_AFTER, "max_steps": STEPS}
    words = command(tmp_path, images=True, tuner_type="lora", **saves)
    run = trained(words, **regate(tmp_path))
    checkpoint = str(tmp_path / "out" / f"checkpoint-{SAVED_AFTER}")
    resumed = trained([*words, "--resume_from_checkpoint", checkpoint], **regate(tmp_path))
    assert_same_run(resumed, run, STEPS)
    assert resumed.regate.metrics() == run.regate.metrics()
    assert not run.regate.metrics()["dense"]


@pytest.mark.parametrize("kind", ["llava", *CLASSES])
def test_evaluation_is_of_the_model_without_a_plan(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = {}
    if kind in CLASSES:
        save_qwen(kind, tmp_path / "llava", monkeypatch)
        more = {"model_type": kind, "template": kind}
    trainer = trained(command(tmp_path, True, **more), **regate(tmp_path))
    data = trainer.train_dataset._dataset
    attached = trainer.evaluate(data)["eval_loss"]
    trainer.regate.remove()
    assert trainer.evaluate(data)["eval_loss"] == attached > 0


def test_two_ranks_train_as_one_with_twice_as_many_micro_batches(tmp_path: Path):
    (tmp_path / "regate_plugin.py").write_text(PLUGIN)
    losses = []
    for num_ranks in (1, 2):
        out = tmp_path / f"ranks-{num_ranks}"
        words = command(
            tmp_path,
            images=True,
            output_dir=out,
            max_steps=STEPS,
            gradient_accumulation_steps=4 // num_ranks,
            external_plugins="regate_plugin.py",
            # The last norm of LLaVA's tower has no gradient, with elision or without.
            ddp_find_unused_parameters=True,
        )
        ranks = {"NPROC_PER_NODE": str(num_ranks), "MASTER_PORT": str(free_port())}
        run(shlex.join(["swift", "sft", *words]), tmp_path, **(ranks if num_ranks > 1 else {}))
        rows = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_page_runs_as_it_stands(tmp_path: Path):
    save_llava(tmp_path).rename(tmp_path / "student")
    save_talks(tmp_path, True).rename(tmp_path / "talks.json")
    rows = run_page(ROOT / "docs" / "swift.md", tmp_path)
    shares = [row["regate/answer_kept_share"] for row in rows]
    assert 0 < min(shares) < 1 == max(shares)


REFUSED = {
    "loss_scale, whose weights": "--loss_scale react",
    "enable_dft_loss=True, a loss": "--enable_dft_loss true",
    "enable_channel_loss=True, a loss": "--enable_channel_loss true",
    "train_dataset=": "--streaming true",
    "label_smoothing_factor=0.1": "--label_smoothing_factor 0.1",
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(message: str, tmp_path: Path):
    words = [*command(tmp_path), *shlex.split(REFUSED[message])]
    with pytest.raises(ValueError, match=r"^elision in [^\n]+$") as caught:
        trained(words, regate=RegateConfig(keep_share=1.0))
    assert message in str(caught.value)


def test_rows_of_several_samples_and_hooks_are_refused(tmp_path: Path):
    # ms-swift itself asks for flash attention there, which needs a GPU.
    trainer = trained(command(tmp_path), regate=RegateConfig(enabled=False))
    for name in ("packing", "padding_free"):
        setattr(trainer.template, name, True)
        with pytest.raises(ValueError, match=f"with {name}=True, "):
            ms_swift._require_supported(trainer)
        setattr(trainer.template, name, False)
    ms_swift._require_supported(trainer)
    trainer.template.__class__ = InternvlTemplate
    with pytest.raises(ValueError, match="template InternvlTemplate, whose hook"):
        ms_swift._require_supported(trainer)
    trainer.template.__class__ = Qwen3VLTemplate
    ms_swift._require_supported(trainer)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed and template Qwen3VLTemplate, where"):
        ms_swift._require_supported(trainer)


def test_other_tasks_and_a_second_installation_are_refused():
    install_in_swift(RegateConfig(keep_share=1.0))
    with pytest.raises(RuntimeError, match="installed in ms-swift already"):
        install_in_swift(RegateConfig())

    class Args:
        task_type, rlhf_type = "causal_lm", "dpo"

    make = TrainerFactory.get_trainer_cls(Args)
    with pytest.raises(ValueError, match="task 'dpo', whose trainer is another"):
        make(args=Args, model=None)
