"""Random conversations: several turns and images, many scripts, odd sizes, answers not learnt."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from regate_ds.data.llava.media import InlineImage, Video
from regate_ds.data.llava.records import Record, Turn

WORDS = [
    "what",
    "is",
    "shown",
    "red",
    "blue",
    "7",
    "größer",
    "naïve",
    "数字",
    "🙂",
    "(a)",
    "A.",
    "it's",
    "e\u0301te\u0301",
]
SPACES = [" ", " ", " ", "\n", "\n\n", "  ", "", "\t"]


def random_image(random: Random, sizes: range = range(9, 70)) -> InlineImage:
    shape = (random.choice(sizes), random.choice(sizes), 3)
    pixels = np.random.default_rng(random.randrange(1 << 30)).integers(0, 256, shape, np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return InlineImage(file.getvalue(), "a picture")


def random_text(random: Random, most: int = 8) -> str:
    pieces = []
    for _ in range(random.randint(1, most)):
        pieces += [random.choice(WORDS), random.choice(SPACES)]
    return "".join(pieces[:-1])


def random_record(
    random: Random, number: int = 0, *, num_images: int | None = None, plain: bool = False
) -> Record:
    """Return a record. plain: its answers have no white space around them, and all are learnt."""
    num_turns = random.randint(1, 3)
    left = random.choice([0, 1, 1, 2, 3]) if num_images is None else num_images
    images: list[InlineImage] = []
    turns: list[Turn] = []
    for turn in range(num_turns):
        here = left if turn == num_turns - 1 else random.randint(0, left)
        left -= here
        parts = [random_text(random)]
        for _ in range(here):
            images.append(random_image(random))
            parts += ["<image>", random.choice(["\n", "", " "])]
        if random.random() < 0.5:
            parts.reverse()
        answer = random_text(random, 12)
        if not plain and random.random() < 0.3:
            answer = random.choice([" ", "\n", ""]) + answer + random.choice([" ", "\n", ""])
        learn = plain or turn == num_turns - 1 or random.random() < 0.7
        turns.append(Turn("".join(parts), answer, learn=learn))
    return Record(
        key=("mine", number),
        id=None,
        images=tuple(images),
        images_per_marker=(1,) * len(images),
        turns=tuple(turns),
        source=Path("mine.json"),
        system=random_text(random) if random.random() < 0.3 else None,
    )


def with_videos(random: Random, record: Record, make: Callable[[], Video]) -> Record:
    """Put videos into the places of some of a record's images."""
    images = tuple(make() if random.random() < 0.5 else image for image in record.images)
    markers = iter(["<video>" if isinstance(each, Video) else "<image>" for each in images])
    turns = [
        replace(turn, question=re.sub("<image>", lambda _: next(markers), turn.question))
        for turn in record.turns
    ]
    return replace(record, images=images, turns=tuple(turns))


def frames_of(video: Video) -> np.ndarray:
    """Return all frames of a video [F, H, W, 3]."""
    if isinstance(video.source, Path):
        import av

        with av.open(str(video.source)) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    return np.stack([np.asarray(_picture(frame)) for frame in video.source])


def _picture(image: Any) -> Image.Image:
    return Image.open(BytesIO(image.content)).convert("RGB")


def pictures_of(record: Record) -> list[Any]:
    """Return what a record shows; a video is an array of all its frames."""
    return [
        frames_of(each) if isinstance(each, Video) else _picture(each) for each in record.images
    ]


def said(record: Record) -> list[dict[str, Any]]:
    """Return the record as the processor's own call takes it, pictures included."""
    pictures = iter(pictures_of(record))
    messages: list[dict[str, Any]] = []
    if record.system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": record.system}]})
    for turn in record.turns:
        parts: list[dict[str, Any]] = []
        first, *others = re.split("<image>|<video>", turn.question)
        parts += [{"type": "text", "text": first}] if first else []
        for text in others:
            shown = next(pictures)
            kind = "video" if isinstance(shown, np.ndarray) else "image"
            parts.append({"type": kind, kind: shown})
            parts += [{"type": "text", "text": text}] if text else []
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages
