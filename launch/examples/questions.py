"""What the DeepSpeed examples take as given: arguments, a data set and a collate function.

The data set has questions about images in LLaVA's JSON format, for a LLaVA model in a Hugging Face
folder.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoTokenizer


class Questions(Dataset[dict[str, Any]]):
    """Items are dicts: input_ids, labels (-100 outside of answers) and pixel_values."""

    def __init__(self, path: Path, student: Path, num_image_tokens: int) -> None:
        self.records = json.loads(path.read_text())
        self.images = path.parent
        self.tokenizer = AutoTokenizer.from_pretrained(student)
        self.processor = AutoImageProcessor.from_pretrained(student, backend="pil")
        self.placeholders = "<image>" * num_image_tokens

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        record = self.records[number]
        ids: list[int] = []
        labels: list[int] = []
        for turn in record["conversations"]:
            is_answer = turn["from"] == "gpt"
            text = turn["value"].replace("<image>", self.placeholders)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += [self.tokenizer.eos_token_id] * is_answer
            ids += tokens
            labels += tokens if is_answer else [-100] * len(tokens)
        image = Image.open(self.images / record["image"]).convert("RGB")
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixel_values": pixels,
        }

    def collate(self) -> Any:
        """Return a collate function that pads on the right."""
        return partial(_collate, pad_id=self.tokenizer.pad_token_id)


def parser() -> argparse.ArgumentParser:
    """Return a parser of the arguments that all these scripts take."""
    made = argparse.ArgumentParser()
    made.add_argument("student", type=Path)
    made.add_argument("data", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("--dense", action="store_true", help="the run you had before")
    made.add_argument("--local_rank", type=int, help="from the launcher")
    return made


def _collate(items: list[dict[str, Any]], *, pad_id: int) -> dict[str, torch.Tensor]:
    pad = partial(pad_sequence, batch_first=True)
    lengths = [torch.ones_like(item["input_ids"]) for item in items]
    return {
        "input_ids": pad([item["input_ids"] for item in items], padding_value=pad_id),
        "labels": pad([item["labels"] for item in items], padding_value=-100),
        "attention_mask": pad(lengths),
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
    }
