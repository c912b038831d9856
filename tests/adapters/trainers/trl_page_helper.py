"""docs/trl.md as it stands, and its example on a student and a processor that are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlavaProcessor
from trl import SFTTrainer

from regate_ds import RegateConfig
from regate_ds.adapters.trainers.scored import Scored
from regate_ds.adapters.trainers.trl_sft import RegateSFTTrainer
from regate_ds.recipe.students.load import load_student
from tests.adapters.trainers.trl_helper import CASES, TEMPLATE, WARM
from tests.house.test_docs import blocks
from tests.support.paths import ROOT
from tests.support.planning import config_of

PAGE = ROOT / "docs" / "trl.md"


def diff() -> list[str]:
    """The lines of the page's change of a user's script."""
    (block,) = (block for block, _ in blocks(PAGE) if "\n+" in block)
    return block.splitlines()


def run_page(gone: str, folder: Path, config: RegateConfig) -> Any:
    """The trainer of the script before (``gone`` is "+") or after the change ("-")."""
    given = CASES["assistant only"].given(folder, max_steps=2, learning_rate=0.05)
    names = {
        **{"SFTTrainer": SFTTrainer, "RegateSFTTrainer": RegateSFTTrainer, "config": config},
        **{"model": given["model"], "args": given["args"], "dataset": given["train_dataset"]},
        "processor": given["processing_class"],
        "Scored": lambda store: Scored(folder / store),
    }
    exec("\n".join(line[1:] for line in diff() if not line.startswith(gone)), names)
    return names["trainer"]


OFF, ON = RegateConfig(enabled=False), config_of(**WARM)


def save_processor(student: Path) -> None:
    """Beside a student that has a tokenizer and an image processor."""
    loaded = load_student(student)
    vision = loaded.model.config.vision_config
    LlavaProcessor(
        loaded.vision.processor,
        loaded.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(student)
