"""What is fuzzed: for each kind of input a good one, a way to change it, and who reads it.

A reader returns what it read, or raises ValueError; any other error is a fault of ours.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from regate_ds.recipe.config.tree import dump_config, load_config
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.stores.reference.lifecycle import begin_store
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.stores.reference.writer import ReferenceWriter
from regate_ds.teacher.loading import load_teacher, load_teacher_tokenizer
from tests.data.formats.formats_helper import llava, messages, read_both_ways, text
from tests.support.gguf_files import write_gguf
from tests.support.models import causal_lm
from tests.support.samples import make_index

RECORDS: list[dict[str, Any]] = [
    llava(
        "<image>\nWhat is it?", "A red 7.", "And here?", "Größe \u2028 🙂.", id="a", image="a.png"
    ),
    llava("Hello", "Hi.", id=3),
    messages("Hello", "Hi."),
    messages([{"type": "image", "image": "a.png"}, text("What is it?")], [text("A 7.")]),
]

PIECES = [
    *(
        "<image>",
        "<video>",
        '"',
        "\\",
        "\\u0000",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\n",
        "\ufeff",
        "null",
    ),
    *(
        "1e999",
        "-1",
        "NaN",
        "true",
        '"value"',
        "gpt",
        "human",
        "role",
        "..",
        "\x00",
        "é",
        "- ",
        "&a ",
        "*a",
    ),
]
"""What is put into texts: marks of the formats, and what parsers have stumbled over."""


@dataclass(frozen=True)
class Subject:
    """One kind of input."""

    name: str
    make: Callable[[Path], None]
    """Write a good input into an empty folder."""

    change: Callable[[random.Random, Path], str]
    """Change it, and say how: "must be refused" if whatever else is silent acceptance."""

    read: Callable[[Path], Any]


MUST = "must be refused"


def changed_bytes(draw: random.Random, content: bytes) -> bytes:
    """Return bytes with up to four changes: a bit, a span gone or doubled, a piece put in."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        span = data[at : at + draw.randint(1, 24)]
        kind = draw.randrange(4)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + len(span)]
        elif kind == 2:
            data[at:at] = span
        else:
            data[at:at] = draw.choice(PIECES).encode()
    return bytes(data)


def _change_file(name: str) -> Callable[[random.Random, Path], str]:
    def change(draw: random.Random, folder: Path) -> str:
        path = folder / name
        path.write_bytes(changed_bytes(draw, path.read_bytes()))
        return "bytes"

    return change


def _write_list(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps(RECORDS, ensure_ascii=False))


def _write_lines(folder: Path) -> None:
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    (folder / "data.jsonl").write_text("".join(lines))


def _read_both_ways(path: Path) -> Any:
    (path.parent / "a.png").touch()
    return read_both_ways(path)


def _write_config(folder: Path) -> None:
    (folder / "given.yaml").write_text(
        "data: {train: t.json}\nmodel: {path: student}\nrun: {out: out}\nteacher: {store: store}\n"
    )
    whole = dump_config(load_config(folder / "given.yaml"))
    (folder / "run.yaml").write_text(whole)


def _write_store(folder: Path) -> None:
    index = make_index(8)
    rows = [torch.tensor([5, 0, 7]), torch.tensor([2]), torch.tensor([1, 6, 3, 4])]
    begin_store(folder / "store", index, "teacher", lambda _: rows, 64)
    writer = ReferenceWriter(folder / "store", index)
    values_N = _losses()
    for number, rows_R in enumerate(rows):
        writer.write_shard(number, values_N[index.locate([index.keys[r] for r in rows_R])])
    writer.finish()


def _losses() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 8 * torch.rand(make_index(8).num_tokens, generator=generator)


def _change_store(draw: random.Random, folder: Path) -> str:
    files = sorted(path for path in (folder / "store").rglob("*") if path.is_file())
    path = draw.choice(files)
    before = path.read_bytes()
    after = changed_bytes(draw, before)
    path.write_bytes(after)
    return MUST if after != before else "nothing"


def _read_store(folder: Path) -> Any:
    index = make_index(8)
    store = ReferenceStore(folder / "store", verify="full")
    return store.read(index.keys).tolist()


def _write_gguf(folder: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    tokenizer = train_tokenizer(["What is it?", "A red 7."], vocab_size=270)
    model = causal_lm(num_layers=1, vocab_size=len(tokenizer))
    write_gguf(model, tokenizer, folder / "teacher.gguf")


def _change_gguf(draw: random.Random, folder: Path) -> str:
    """Change the header: its numbers, as a bomb does, or any of its bytes."""
    path = folder / "teacher.gguf"
    content = bytearray(path.read_bytes())
    length = content.index(b"token_embd.weight") + 600
    if draw.random() < 0.5:
        path.write_bytes(changed_bytes(draw, bytes(content[:length])) + content[length:])
        return "bytes"
    at = draw.choice([8, 16, draw.randrange(length)])
    huge = draw.choice([0, 255, 2**31, 2**33, 2**40, 2**62, 2**64 - 1])
    content[at : at + 8] = huge.to_bytes(8, "little")
    path.write_bytes(content)
    return "numbers"


def _read_gguf(folder: Path) -> Any:
    path = folder / "teacher.gguf"
    return load_teacher_tokenizer(path), load_teacher(path)


SUBJECTS = [
    Subject(
        "JSON list",
        _write_list,
        _change_file("data.json"),
        lambda f: _read_both_ways(f / "data.json"),
    ),
    Subject(
        "JSON lines",
        _write_lines,
        _change_file("data.jsonl"),
        lambda f: _read_both_ways(f / "data.jsonl"),
    ),
    Subject(
        "configuration",
        _write_config,
        _change_file("run.yaml"),
        lambda f: load_config(f / "run.yaml"),
    ),
    Subject("store", _write_store, _change_store, _read_store),
    Subject("GGUF header", _write_gguf, _change_gguf, _read_gguf),
]


def renew(good: Path, folder: Path) -> None:
    """Put a fresh copy of the good input where the last one was changed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
