"""TRL's SFTTrainer with ReGATE: one sparse step of it, as it runs and as the oracle has it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import LlavaProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer

from regate_ds import RegateConfig
from regate_ds.adapters.trainers.scored import Scored
from regate_ds.adapters.trainers.trl_sft import RegateSFTMixin, RegateSFTTrainer
from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.collate import Batch
from regate_ds.teacher.backbone import text_backbone
from tests.adapters.torch.loops_helper import whole
from tests.adapters.trainers.sft_helper import answer, embedded, gated_of, oracle, question
from tests.support.measure import Gradients, assert_gradients_equal
from tests.support.oracle import oracle_logits
from tests.support.planning import config_of
from tests.support.tiny_students import CLIP, make_image, make_llava, make_tokenizer

TEMPLATE = (
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}"
    "{% endif %}{% endmacro %}"
    "{% for m in messages %}{% if m.role == 'user' %}USER : {{ said(m.content) }} {% else %}"
    "ASSISTANT : {% generation %}{{ said(m.content) }} </s>{% endgeneration %} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT : {% endif %}"
)
WARM = {"warmup": 0, "final_dense_share": 0.0}


def talks(number: int) -> list[dict[str, Any]]:
    turns = ("user", question), ("assistant", answer)
    return [{"role": role, "content": of(number)} for role, of in turns]


def texts(num: int = 8) -> Dataset:
    return Dataset.from_list([{"messages": talks(n)} for n in range(num)])


def completions(num: int = 8) -> Dataset:
    rows = [{"prompt": question(n), "completion": f" {answer(n)}"} for n in range(num)]
    return Dataset.from_list(rows)


def picture_talks(num: int = 8, *, blind: Sequence[int] = ()) -> Dataset:
    """``blind``: the samples without an image."""
    images = [[] if n in blind else [make_image(seed=n)] for n in range(num)]
    return Dataset.from_list([{"messages": talks(n), "images": images[n]} for n in range(num)])


def picture_completions(num: int = 8) -> Dataset:
    rows = [{"prompt": talks(n)[:1], "completion": talks(n)[1:]} for n in range(num)]
    return Dataset.from_list(
        [{**row, "images": [make_image(seed=n)]} for n, row in enumerate(rows)]
    )


def tokenizer() -> Any:
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def processor() -> LlavaProcessor:
    student = make_llava()
    return LlavaProcessor(
        student.vision.processor,
        student.tokenizer,
        patch_size=CLIP["patch_size"],
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def language_model() -> nn.Module:
    """The text part of the same student."""
    return copy.deepcopy(text_backbone(make_llava().model)).requires_grad_(True).train()


def eyed_model() -> nn.Module:
    return make_llava().model


def lora(targets: str) -> LoraConfig:
    """Both factors at random: peft starts with one at 0, which would hide the other's gradient."""
    return LoraConfig(r=4, target_modules=targets, init_lora_weights=False)


TEXT_LORA = lora(r".*layers.*(q_proj|v_proj|down_proj)")
EYED_LORA = lora(r".*language_model.*(q_proj|up_proj)")


@dataclass(frozen=True)
class SftCase:
    """A job as users of TRL write it."""

    data: Callable[[], Dataset]
    settings: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig | None = None
    sees: bool = False
    knobs: dict[str, Any] = field(default_factory=dict)

    def given(self, folder: Path, **more: Any) -> dict[str, Any]:
        """The arguments of SFTTrainer."""
        return {
            "model": eyed_model() if self.sees else language_model(),
            "processing_class": processor() if self.sees else tokenizer(),
            # Behind all models: with ZeRO-3 in them, later ones would be made without weights.
            "args": settings(folder, **{**self.settings, **more}),
            "train_dataset": self.data(),
            "peft_config": self.lora,
        }

    def regate(self, folder: Path) -> dict[str, Any]:
        return {
            "regate": config_of(**WARM, **self.knobs),
            "reference": Scored(folder / "store"),
        }


def settings(folder: Path, **more: Any) -> SFTConfig:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return SFTConfig(**{**options, **more})


CASES = {
    "assistant only": SftCase(texts, {"assistant_only_loss": True}),
    "completion only": SftCase(completions),
    "LoRA": SftCase(texts, {"assistant_only_loss": True}, lora=TEXT_LORA),
    "packing": SftCase(texts, {"packing": True, "max_length": 40, "assistant_only_loss": True}),
    "padding-free, no packing": SftCase(
        completions, {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16}
    ),
    "packing, LoRA": SftCase(completions, {"packing": True, "max_length": 40}, lora=TEXT_LORA),
    "images, assistant only": SftCase(
        picture_talks,
        {"assistant_only_loss": True},
        sees=True,
        knobs={"images.keep_share": 0.5},
    ),
    "images, completion only, LoRA": SftCase(picture_completions, lora=EYED_LORA, sees=True),
}


class Watching(RegateSFTTrainer):
    """Keeps the model as it was, and the micro-batches as they came from the loader."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.exact = copy.deepcopy(self.model).double()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        self.seen: list[Batch] = [next(epoch_iterator) for _ in range(num_batches)]
        return super().get_batch_samples(iter(self.seen), num_batches, device)


class KeepGradient(TrainerCallback):
    """What the optimizer is given."""

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **_: Any) -> None:
        named = {name: p.grad for name, p in model.named_parameters()}
        self.found = {name: whole(grad) for name, grad in named.items() if grad is not None}


def one_step(
    case: SftCase, folder: Path, kind: type[Watching] = Watching
) -> tuple[Watching, Gradients]:
    kept = KeepGradient()
    trainer = kind(**case.given(folder), callbacks=[kept], **case.regate(folder))
    trainer.train()
    assert not trainer.regate.metrics()["dense"]
    return trainer, kept.found


def logged_by_oracle(trainer: Watching) -> dict[str, float]:
    """What TRL's compute_loss logs: means of each micro-batch's targets, averaged."""
    exact = trainer.exact
    host = exact.get_base_model() if hasattr(exact, "get_base_model") else exact
    rows = []
    for batch, plan in zip(trainer.seen, trainer.regate.plan.micro, strict=True):
        with torch.no_grad():
            inputs = embedded(host, batch.inputs)
            found = oracle_logits(host, inputs, batch.tokens, plan, gated_of(host))
        chances = [logits.softmax(0) for logits, _ in found]
        entropy = sum(float(torch.special.entr(chance).sum()) for chance in chances) / len(found)
        right = [int(logits.argmax()) == target for logits, target in found]
        rows.append((entropy, sum(right) / len(right)))
    entropy, accuracy = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    # It takes all of a joined row for tokens.
    tokens = sum(
        batch.tokens.labels_BT.numel()
        if trainer.padding_free
        else int((batch.tokens.segment_BT >= 0).sum())
        for batch in trainer.seen
    )
    return {"entropy": entropy, "mean_token_accuracy": accuracy, "num_tokens": tokens}


def check_step(case: SftCase, folder: Path) -> None:
    trainer, found = one_step(case, folder)
    check_targets(trainer, case)
    micro = list(zip(trainer.seen, trainer.regate.plan.micro, strict=True))
    assert sum(plan.num_targets for _, plan in micro) == trainer.regate.plan.num_targets_global
    loss, wanted = oracle(trainer.exact, micro)
    assert_gradients_equal(found, wanted, 1e-5)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, rel=1e-6)
    for name, value in logged_by_oracle(trainer).items():
        assert log[name] == pytest.approx(value, rel=1e-5), name
    counts = trainer.regate.metrics()
    assert log["regate/kept_share"] == counts["tokens_kept"] / counts["tokens_total"]
    assert log["regate/teacher_store_seconds"] > 0
    assert (counts["image_kept"] < counts["image_total"]) == ("images.keep_share" in case.knobs)


def check_targets(trainer: Watching, case: SftCase) -> None:
    """Each sample's targets are its answer and its end, behind its own question."""
    words = tokenizer().decode
    wanted = {f"{question(n)} {answer(n)}": answer(n) for n in range(8)}
    for batch in trainer.seen:
        tokens = batch.tokens
        for number in range(len(tokens.flat_keys)):
            is_own_BT = tokens.sample_BT == number
            text = words(batch.inputs["input_ids"][is_own_BT], skip_special_tokens=True)
            for sign in ("USER :", "ASSISTANT :"):
                text = " ".join(text.replace(sign, " ").split())
            labels = tokens.labels_BT[is_own_BT]
            assert words(labels[labels != IGNORE]) == f"{wanted[text]} </s>", text


class Ended:
    """What a run leaves behind."""

    def __init__(self, kind: type[SFTTrainer], given: dict[str, Any], resume: Any = None) -> None:
        self.trainer = kind(**given)
        self.trainer.train(resume_from_checkpoint=resume)
        timed = ("runtime", "per_second", "seconds", "train_loss")
        self.log = [
            {name: value for name, value in row.items() if not name.endswith(timed)}
            for row in self.trainer.state.log_history
        ]
        self.weights = {name: p.detach() for name, p in self.trainer.model.named_parameters()}


def assert_same_run(found: Ended, wanted: Ended) -> None:
    assert found.log == wanted.log
    for name, weight in wanted.weights.items():
        assert torch.equal(weight, found.weights[name]), name


def check_off(case: SftCase, folder: Path) -> None:
    plain = Ended(SFTTrainer, case.given(folder, max_steps=2, learning_rate=0.05))
    given = case.given(folder, max_steps=2, learning_rate=0.05)
    off = Ended(RegateSFTTrainer, {**given, "regate": RegateConfig(enabled=False)})
    assert len(plain.log) == 3
    assert_same_run(off, plain)


def check_resumed(case: SftCase, folder: Path) -> None:
    more = {"max_steps": 3, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 2}
    run = Ended(RegateSFTTrainer, {**case.given(folder, **more), **case.regate(folder)})
    given = {**case.given(folder, **more), **case.regate(folder)}
    resumed = Ended(RegateSFTTrainer, given, str(folder / "checkpoint-2"))
    assert resumed.trainer.regate.metrics() == run.trainer.regate.metrics()
    # TRL counts the tokens of each start anew.
    for row in (*resumed.log, *run.log):
        row.pop("num_tokens", None)
    assert_same_run(resumed, run)


class OwnLoss(SFTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class OwnLossWithRegate(RegateSFTMixin, OwnLoss):
    pass


def refused(
    case: SftCase,
    folder: Path,
    given: dict[str, Any],
    kind: type[SFTTrainer] = RegateSFTTrainer,
    **more: Any,
) -> str:
    """Why such a trainer cannot be made. ``given``: other arguments; ``more``: settings."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        kind(**{**case.given(folder, **more), **given}, **case.regate(folder))
    return str(caught.value)


UNREACHED = "post_layernorm"
"""Weights of LLaVA's tower that no image reaches."""


def check_ranks(rank: int, folder: Path, kind: type[Watching], wrapped: str) -> None:
    """The second rank sees no image, and other numbers of tokens."""
    case = SftCase(
        partial(picture_talks, blind=(1, 3)),
        {
            "assistant_only_loss": True,
            "per_device_train_batch_size": 1,
            "train_sampling_strategy": "sequential",
        },
        sees=True,
        knobs={"images.keep_share": 0.5},
    )
    with mock.patch.dict(os.environ, CI="1"):  # without telemetry
        trainer, found = one_step(case, folder, kind)
    assert type(trainer.model_wrapped).__name__.startswith(wrapped)
    own = list(zip(trainer.seen, trainer.regate.plan.micro, strict=True))
    assert all(("pixel_values" in batch.inputs) == (rank == 0) for batch, _ in own)
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, own)
    loss, wanted = oracle(trainer.exact, [one for part in parts for one in part])
    reached = {name: grad for name, grad in found.items() if UNREACHED not in name}
    assert_gradients_equal(reached, wanted, 1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-6)
