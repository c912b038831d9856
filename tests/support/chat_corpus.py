"""A corpus of random conversations as `messages`, with a student that has a processor."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml

from regate_ds.data.llava.media import Video
from regate_ds.data.llava.records import Record
from tests.support.chat_students import save
from tests.support.conversations import random_record, with_videos
from tests.support.videos import film


def make_chat_corpus(
    folder: Path, name: str, *, num_train: int = 8, num_test: int = 3, with_films: bool = False
) -> Path:
    """Write data, student and run.yaml into a folder; return the last one's path.

    with_films: some of the images are videos, of which four frames are taken.
    """
    random, data = Random(name), folder / "data"
    data.mkdir(parents=True)
    for file, count in (("train", num_train), ("test", num_test)):
        records = [random_record(random, n, plain=True) for n in range(count)]
        if with_films:
            records = [_with_films(random, record, data) for record in records]
        lines = [json.dumps(_line(record, data)) for record in records]
        (data / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    save(name, folder / "student")
    config = {
        "model": {"path": str(folder / "student")},
        "data": {
            "name": "mine",
            "train": str(data / "train.jsonl"),
            "test": str(data / "test.jsonl"),
            "num_workers": 0,
            "video_frames": 4 if with_films else None,
        },
        "teacher": {"store": str(folder / "store")},
        "elision": {"schedule": {"warmup": 1}, "images": {"keep_share": 0.5}},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "schedule": "constant"},
        "run": {"out": str(folder / "run"), "steps": 4, "micro_batch": 2, "precision": "fp32"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def _line(record: Record, folder: Path) -> dict[str, Any]:
    """Return a record as a line, and write its pictures."""
    names, films = [], []
    for number, image in enumerate(record.images):
        if isinstance(image, Video):
            films.append(str(image))
            continue
        names.append(f"{record.key[1]}-{number}-{abs(hash(image)) % 9999}.png")
        (folder / names[-1]).write_bytes(image.content)  # type: ignore[union-attr]
    messages = [] if record.system is None else [{"role": "system", "content": record.system}]
    for turn in record.turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return {"messages": messages, "images": names, "videos": films}


def _with_films(random: Random, record: Record, folder: Path) -> Record:
    return with_videos(
        random,
        record,
        lambda: Video(film(folder / f"{random.random()}.mp4", random.randint(6, 12))),
    )
