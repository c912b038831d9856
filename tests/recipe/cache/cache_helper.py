"""Data files, and an encoder that another process can be given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.read import read_records
from regate_ds.data.llava.records import BadRecord, Record, SampleError
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.data.llava.template import Template
from regate_ds.recipe.cache.source import Source
from regate_ds.stores.answer_index import AnswerIndex

BOS, EOS, IMAGE = 1, 2, 3


class CharTokenizer:
    """One token for each character, its id the code point and ``shift``."""

    bos_token_id, eos_token_id = BOS, EOS
    all_special_tokens = ("</s>",)
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __init__(self, shift: int = 0) -> None:
        self._shift = shift
        self.backend_tokenizer = self

    def to_str(self) -> str:
        return json.dumps({"characters and": self._shift})

    def get_vocab(self) -> dict[str, int]:
        return {"$": IMAGE}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, list[Any]]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        ids = [ord(char) + self._shift for char in text]
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def half(size: tuple[int, int]) -> int:
    """Tokens of an image; a narrow one does not suit the model."""
    if size[0] < 2:
        raise ValueError("too thin")
    return size[0] // 2


def whole(size: tuple[int, int]) -> int:
    return size[0]


def encoder(rule: Any = half, shift: int = 0, max_length: int = 60, user: str = "U:") -> Encoder:
    return Encoder(
        CharTokenizer(shift),
        image_token="$",
        num_image_tokens=rule,
        max_length=max_length,
        template=Template(user=user, assistant=" A:"),
    )


def source(
    path: Path, name: str = "set", image_root: Path | None = None, **settings: Any
) -> Source:
    return Source(path, name, image_root, encoder(**settings))


def talk(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", "conversations": turns, **fields}


def draw(path: Path, width: int, height: int = 3) -> Path:
    Image.new("RGB", (width, height)).save(path)
    return path


GOOD = [
    talk("wie groß?", "so \u2028 groß \U0001f600"),
    talk("<image>what", "a cat", image="a.png"),
    talk("<image>or<image>", "both", image=["a.png", "b.png"]),
    talk("long", "answer " * 20),
    talk("short", "y", id=None),
]

BAD = [
    talk("q", " "),
    talk("say </s>", "y"),
    talk("<image>", "y", image="absent.png"),
    talk("<image>", "y", image="thin.png"),
    talk("q" * 70, "cut"),
    talk("half \ud83d", "y", id="\ud83d"),
    [1],
]


def write(folder: Path, records: list[Any], name: str = "data.json") -> Path:
    for image, width in (("a.png", 4), ("b.png", 7), ("thin.png", 1)):
        draw(folder / image, width)
    path = folder / name
    text = json.dumps(records)
    if path.suffix == ".jsonl":
        text = "".join(f"{json.dumps(record)}\n" for record in records)
    path.write_text(text)
    return path


def in_memory(of: Source) -> tuple[list[Record], list[BadRecord], AnswerIndex]:
    """The oracle: everything is read, then each record is encoded by itself."""
    records, bad = read_records(of.path, name=of.name, image_root=of.image_root, skip_bad=True)
    samples: list[EncodedSample] = []
    for record in records:
        try:
            samples.append(of.encoder.encode(record))
        except SampleError as error:
            bad.append(error.bad)  # type: ignore[arg-type]
    keys = {sample.key for sample in samples}
    return [r for r in records if r.key in keys], bad, AnswerIndex.build(samples)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
