"""`make realmodel`: test whether a real teacher from a GGUF file finds the words that need images.

It scores the same digit scenes twice: for a student with the teacher's own tokenizer, and for one
with a tokenizer trained here, whose losses are aligned by characters. A word that needs the image
counts as found if its hardest token is in the upper half of its sample's label positions, those
that a sparse step at keep_share=0.5 keeps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from regate_ds.data.llava.read import read_records
from regate_ds.data.llava.records import Record
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.student import save_student
from regate_ds.recipe.tasks.digits.scenes import build_digits
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.loading import load_teacher_tokenizer

WANTED = 0.85
"""Share of the words above which the command succeeds."""

TINY_TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
"""The student's decoder, as small as possible: the teacher needs only the student's tokenizer."""

TINY_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 16,
    "projection_dim": 32,
}


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if enough words are found with both tokenizers, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file of a causal language model")
    parser.add_argument("--scenes", type=int, default=60, metavar="N", help="samples to score")
    parser.add_argument("--out", type=Path, default=Path("runs/realmodel"))
    args = parser.parse_args(arguments)
    build_digits(args.out / "data", num_train=args.scenes, num_test=1, seed=0)
    lowest = 1.0
    for mode, tokenizer in _tokenizers(args.model, args.out / "data" / "train.json"):
        begin = time.monotonic()
        config = _configure(args.out / mode, args.out / "data", args.model, tokenizer, mode)
        command = [sys.executable, "-m", "regate_ds.cli", "teacher", str(config)]
        subprocess.run(command, check=True)
        num_found, num_words = words_found(config)
        lowest = min(lowest, num_found / num_words)
        print(
            f"teacher.tokenizer={mode}: {num_found} of {num_words} words that need the image "
            f"({num_found / num_words:.1%}) are in the upper half; "
            f"{time.monotonic() - begin:.0f} s",
            flush=True,
        )
    return 0 if lowest > WANTED else 1


def words_found(config: Path) -> tuple[int, int]:
    """Count the gold words of the training set that a finished store puts in the upper half.

    Returns that count, and the number of all gold words.
    """
    run = load_config(config)
    corpus = load_corpus(run, weights=False)
    assert run.teacher.store is not None
    store = ReferenceStore(run.teacher.store)
    hits: list[bool] = []
    for number, record in enumerate(corpus.train_records):
        sample = corpus.train.encode(number)
        hits += words_in_upper_half(record, sample, store.read([sample.key]))
    return sum(hits), len(hits)


def words_in_upper_half(record: Record, sample: EncodedSample, losses_N: Tensor) -> Iterator[bool]:
    """Yield for each gold span whether its hardest token is in the harder half of the labels."""
    order = losses_N.argsort(descending=True, stable=True).tolist()
    upper = set(order[: -(-len(order) // 2)])
    for number, turn in enumerate(record.turns):
        for start, end in turn.gold_spans:
            tokens = [
                n
                for n, (of_turn, a, b) in enumerate(sample.char_spans)
                if of_turn == number and a < end and start < b
            ]
            yield bool(upper.intersection(tokens))


def _tokenizers(model: Path, train: Path) -> Iterator[tuple[str, Any]]:
    """Yield each mode of `teacher.tokenizer`, with the student's tokenizer in it."""
    same = deepcopy(load_teacher_tokenizer(model))
    same.add_special_tokens({"additional_special_tokens": ["<image>"]})
    yield "same", same
    records, _ = read_records(train, name="digits")
    texts = [text for r in records for turn in r.turns for text in (turn.question, turn.answer)]
    yield "own", train_tokenizer(texts, vocab_size=448)


def _configure(out: Path, data: Path, model: Path, tokenizer: Any, mode: str) -> Path:
    """Write a student's folder and a configuration that names it and the teacher; return that."""
    student = build_llava(tokenizer, text=TINY_TEXT, vision=TINY_VISION, seed=0)
    save_student(student, out / "student")
    config = {
        "model": {"path": str(out / "student")},
        "data": {"train": str(data / "train.json"), "max_length": 512},
        "teacher": {
            "path": str(model),
            "tokenizer": mode,
            "store": str(out / "store"),
            "tokens_per_batch": 1024,
        },
        "run": {"out": str(out / "run")},
    }
    path = out / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


if __name__ == "__main__":
    sys.exit(main())
