"""Put images and videos into a rendered text, and keep track of its answers.

A run of patches is one token of text, and repeated behind the tokenizer, which reads each special
token by itself: the tokens are the same, and an image may have thousands. All places count
characters.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from regate_ds.data.chat.image_text import ImageWriter
from regate_ds.data.chat.render import AnswerPlace, Rendered
from regate_ds.data.llava.clips import VisualShape
from regate_ds.data.llava.media import ImageSource, Video, VideoShape


@dataclass(frozen=True)
class Written:
    """A record's text with its images and videos written out."""

    text: str
    images: list[tuple[int, int]]
    """Place [start, end) of what stands for each image or video, in reading order."""

    runs: list[tuple[int, ...]]
    """For each of them the number of patches of each run, which is one token in the text."""

    answers: list[AnswerPlace | None]
    shapes: list[VisualShape]
    numbers: list[int]
    """Which image or video of the record each of them is: a template may put them in order."""

    def sources(self, own: Sequence[ImageSource], images: ImageWriter) -> Iterator[ImageSource]:
        """Yield each image, and each video with what is known of it. own: the record's."""
        for number, shape in zip(self.numbers, self.shapes):
            source = own[number]
            if isinstance(source, Video) and isinstance(shape, VideoShape):
                source = replace(source, shape=shape, taken=images.taken(shape))
            yield source


def write(
    rendered: Rendered, images: ImageWriter, shapes: list[VisualShape], *, ending: str | None = None
) -> Written:
    """Write a record's images and videos out.

    ending: what is to end each answer in the place of the template's own token; None keeps that.
    ValueError if the text has another number of them, or one cannot have its shape.
    """
    places = _places(rendered.text, images, shapes)
    if not places and ending is None:
        return Written(rendered.text, [], [], list(rendered.answers), [], [])
    numbers = [number for _, _, number in places]
    texts = images.texts(shapes)
    shortened = [_in_runs(texts[number], shapes[number], images) for number in numbers]
    changes = [(start, end, text) for (start, end, _), (text, _) in zip(places, shortened)]
    shown = len(changes)
    if ending is not None:
        changes += [(one.end, one.closed, ending) for one in rendered.answers if one is not None]
    text, moves = _change(rendered.text, sorted(changes))

    def moved(place: int) -> int:
        return place + moves[bisect_right(moves, (place, sys.maxsize)) - 1][1]

    return Written(
        text=text,
        images=[(moved(start), moved(end)) for start, end, _ in changes[:shown]],
        runs=[runs for _, runs in shortened],
        answers=[
            a and replace(a, start=moved(a.start), end=moved(a.end), closed=moved(a.closed))
            for a in rendered.answers
        ],
        shapes=[shapes[number] for number in numbers],
        numbers=numbers,
    )


def _places(
    text: str, images: ImageWriter, shapes: Sequence[VisualShape]
) -> list[tuple[int, int, int]]:
    """Return the place [start, end) of each placeholder, and the number of the image or video that
    it stands for: the next one of its kind. ValueError if there are too few or too many."""
    kinds: dict[str | None, list[int]] = {images.placeholder: []}
    for number, shape in enumerate(shapes):
        is_video = isinstance(shape, VideoShape)
        kind = images.video_placeholder if is_video else images.placeholder
        kinds.setdefault(kind, []).append(number)
    places: list[tuple[int, int, int]] = []
    for kind, numbers in kinds.items():
        assert kind is not None
        starts = [found.start() for found in re.finditer(re.escape(kind), text)]
        if len(starts) != len(numbers):
            word = "images" if kind == images.placeholder else "videos"
            raise ValueError(
                f"the chat template writes {len(starts)} {word} of its {len(numbers)}; set "
                "data.template"
            )
        places += [(start, start + len(kind), number) for start, number in zip(starts, numbers)]
    return sorted(places)


def _in_runs(text: str, shape: VisualShape, images: ImageWriter) -> tuple[str, tuple[int, ...]]:
    if not isinstance(shape, VideoShape):
        return _shortened(text, images.patch)
    assert images.video_patch is not None
    # The texts of videos are too long to be kept.
    return _shortened.__wrapped__(text, images.video_patch)


@lru_cache(maxsize=4096)
def _shortened(text: str, patch: str) -> tuple[str, tuple[int, ...]]:
    """Return a text with each run of patches as one, and the length of each run."""
    one = re.escape(patch)
    runs = [len(run.group()) // len(patch) for run in re.finditer(f"(?:{one})+", text)]
    return re.sub(f"(?:{one})+", lambda _: patch, text), tuple(runs)


def _change(
    text: str, changes: Sequence[tuple[int, int, str]]
) -> tuple[str, list[tuple[int, int]]]:
    """Put each text in the place of [start, end), in rising order.

    Also returns from which place on the old text is moved, and by how much.
    """
    pieces: list[str] = []
    moves, last = [(0, 0)], 0
    for start, end, new in changes:
        pieces += [text[last:start], new]
        moves.append((end, moves[-1][1] + len(new) - (end - start)))
        last = end
    return "".join([*pieces, text[last:]]), moves
