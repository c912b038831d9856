"""How a task's builder writes its parts: LLaVA's JSON, with the spans of the gold words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from regate_ds.job.progress import progress
from regate_ds.recipe.tasks.answers import QuestionAnswer


def write_parts(
    out: Path, numbers: Mapping[str, int], write: Callable[[str, int], dict[str, Any]]
) -> None:
    """Write ``out``/NAME.json for each part; ``write`` makes the record of a part and a number.

    It also writes the images that the record names. ValueError if a part has no sample.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(
                f"the {name} part needs at least 1 sample, got {number}; ask for 1 or more"
            )
    for name, number in numbers.items():
        records = []
        with progress(number, desc=f"{name} scenes", unit="scene") as bar:
            for i in range(number):
                records.append(write(name, i))
                bar.update()
        (out / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def conversation(medium: str, exchanges: Sequence[QuestionAnswer]) -> list[dict[str, Any]]:
    """Return the turns of a record on one ``medium``, "image" or "video"."""
    turns: list[dict[str, Any]] = []
    for question, answer in exchanges:
        marker = "" if turns else f"<{medium}>\n"
        turns.append({"from": "human", "value": marker + question})
        spans = [list(span) for span in answer.gold_spans]
        turns.append({"from": "gpt", "value": answer.text, "gold_spans": spans})
    return turns


def save_image(image: Image.Image, path: Path) -> None:
    """Save an image, and make its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
