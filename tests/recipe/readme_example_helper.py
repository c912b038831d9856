"""Runs README's example, word for word, on the small corpus in the folder it is started in.

python -m tests.recipe.readme_example_helper README.md on|off
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from regate_ds.algorithm.batch import host_labels
from regate_ds.job.process import start_process
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.teacher.backbone import text_backbone

DS = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def main(readme: Path, switch: str) -> None:
    start_process()
    corpus = load_corpus(load_config(Path("run.yaml")))

    class Data(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, number: int) -> dict[str, Any]:
            return {"sample": corpus.train[number]}

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = corpus.collator([item["sample"] for item in items])
        mask = (batch.tokens.segment_BT >= 0).long()
        labels = host_labels(batch.tokens.labels_BT)
        return {**batch.inputs, "labels": labels, "attention_mask": mask}

    (block,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    code = block.replace('"store"', '"own_store"')
    # This corpus has images.
    code = code.replace("image_token_id=None", "image_token_id=image_token_id")
    if switch == "off":
        assert code.count("RegateConfig()") == 1
        code = code.replace("RegateConfig()", "RegateConfig(enabled=False)")
    names = {
        "model": corpus.student.model.train(),
        "data": Data(),
        "collate": collate,
        "ds": DS,
        "T": 4,
        "checkpoint_dir": Path("checkpoint"),
        "image_token_id": corpus.student.model.config.image_token_id,
        "text_model": text_backbone(corpus.student.model),
    }
    exec(code, names)  # noqa: S102 (our own README)
    steps = names["engine"].global_steps
    print(f"steps {steps} {switch}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
