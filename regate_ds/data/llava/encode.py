"""Turn a record into token ids, and mark its image positions and its answer tokens.

Shapes: S positions of one sample, B rows, T positions of a row.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, shift_labels
from regate_ds.data.llava.images import sizes_of
from regate_ds.data.llava.media import ImageSource
from regate_ds.data.llava.records import MARKER, Record, Turn, bad_record, describe
from regate_ds.data.llava.sample import CharSpan, EncodedSample
from regate_ds.data.llava.template import Template, prompt, require_no_image


class VisionInputs(Protocol):
    """Makes the image inputs of one family of students."""

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Return the number of placeholders of one image of (width, height)."""
        ...

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the placeholders of one image of (width, height)."""
        ...

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Make the model inputs of a micro-batch's RGB images, at least one, in reading order."""
        ...

    def extra_inputs(self, input_ids_BT: Tensor, is_placeholder_BT: Tensor) -> dict[str, Tensor]:
        """Make further model inputs that follow from the tokens; by default there are none."""
        return {}


@dataclass
class _Tape:
    """A sample that is being written, token by token."""

    ids: list[int] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    """Number of the image at image positions, -1 elsewhere."""

    num_images: int = 0
    spans: list[CharSpan | None] = field(default_factory=list)
    """Place of each answer token; None for all other tokens."""

    def add(self, ids: list[int], *, image: int = -1) -> None:
        self.ids += ids
        self.image += [image] * len(ids)
        self.spans += [None] * len(ids)

    def add_image(self, ids: list[int]) -> None:
        self.add(ids, image=self.num_images)
        self.num_images += 1

    def add_answer(self, ids: list[int], spans: list[CharSpan]) -> None:
        self.ids += ids
        self.image += [-1] * len(ids)
        self.spans += spans


class Encoder:
    """Writes records as tokens, with any fast Hugging Face tokenizer.

    Each text between images, and each answer, is tokenised by itself, so that an answer's tokens
    never depend on the words before it. Samples are cut at ``max_length`` tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        image_token: str | int,
        num_image_tokens: Callable[[tuple[int, int]], int],
        max_length: int,
        template: Template,
    ) -> None:
        """Set up for one tokenizer.

        image_token: the model's own image token, or the id of any token to use in its place.
        ValueError if the tokenizer has no eos token, or does not know the image token.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the {type(tokenizer).__name__} has no eos token, which must end each answer; "
                "set its eos_token"
            )
        self._tokenizer = tokenizer
        self._image_id = _image_id(tokenizer, image_token, template)
        self._special = _special_tokens(tokenizer, image_token)
        self._num_image_tokens = num_image_tokens
        self._max_length = max_length
        self._template = template

    def encode(self, record: Record) -> EncodedSample:
        """Encode one record; only the sizes of its images are read. SampleError if it is bad."""
        tape = self._write(record)
        length = min(len(tape.ids), self._max_length)
        if any(image >= 0 for image in tape.image[length:]):
            raise self._too_long(record, len(tape.ids), "would cut an image's placeholders off")
        ids_S = torch.tensor(tape.ids[:length])
        spans = tape.spans[:length]
        is_answer_S = torch.tensor([span is not None for span in spans])
        labels_S = shift_labels(torch.where(is_answer_S, ids_S, IGNORE)[None])[0]
        if not bool((labels_S != IGNORE).any()):
            raise self._too_long(record, len(tape.ids), "leaves no answer token to learn from")
        return EncodedSample(
            key=record.key,
            input_ids_S=ids_S,
            labels_S=labels_S,
            image_S=torch.tensor(tape.image[:length]),
            # No position predicts the first token of a sample.
            char_spans=tuple(span for span in spans[1:] if span is not None),
            images=record.images,
        )

    def uncut(self, tokenizer: Any = None, *, placeholder_id: int | None = None) -> Encoder:
        """Make an encoder of the same text without ``max_length``.

        tokenizer: another one to use. placeholder_id: its token for image positions.
        """
        return Encoder(
            self._tokenizer if tokenizer is None else tokenizer,
            image_token=self._image_id if placeholder_id is None else placeholder_id,
            num_image_tokens=self._num_image_tokens,
            max_length=sys.maxsize,
            template=self._template,
        )

    def is_cut(self, sample: EncodedSample) -> bool:
        """Return whether ``max_length`` may have cut the sample's end off."""
        return len(sample) >= self._max_length

    def begins_with_answer(self, record: Record) -> bool:
        """Return whether the sample's first token is an answer's, so that no token predicts it."""
        return self._tokenizer.bos_token_id is None and prompt(record, 0, self._template) == [""]

    def _write(self, record: Record) -> _Tape:
        tape = _Tape()
        if self._tokenizer.bos_token_id is not None:
            tape.add([self._tokenizer.bos_token_id])
        media = iter(record.images_per_marker)
        sizes = sizes_of(record)
        for number, turn in enumerate(record.turns):
            self._require_plain(record, number, turn)
            first, *others = prompt(record, number, self._template)
            self._add_text(tape, first)
            for text in others:
                for _ in range(next(media)):
                    self._add_image(tape, record, *next(sizes))
                self._add_text(tape, text)
            self._add_answer(tape, number, turn)
        return tape

    def _require_plain(self, record: Record, number: int, turn: Turn) -> None:
        """Refuse, by SampleError, text that the tokenizer would read as a special token."""
        texts = {
            f"question {number + 1}": MARKER.sub("\n", turn.question),
            f"answer {number + 1}": turn.answer,
            "system text": (record.system or "") if number == 0 else "",
        }
        for where, text in texts.items():
            if found := self._special.search(text):
                cause = f"its {where} holds {found.group()!r}, a special token's text"
                raise bad_record(describe(record, cause))

    def _add_text(self, tape: _Tape, text: str) -> None:
        if text:
            tape.add(self._tokenize(text)["input_ids"])

    def _add_answer(self, tape: _Tape, number: int, turn: Turn) -> None:
        encoding = self._tokenize(turn.answer)
        end = len(turn.answer)
        ids = [*encoding["input_ids"], self._tokenizer.eos_token_id]
        if not turn.learn:
            tape.add(ids)
            return
        spans = [(number, start, stop) for start, stop in encoding["offset_mapping"]]
        tape.add_answer(ids, [*spans, (number, end, end)])

    def _add_image(
        self, tape: _Tape, record: Record, source: ImageSource, size: tuple[int, int]
    ) -> None:
        try:
            count = self._num_image_tokens(size)
        except ValueError as error:
            cause = f"image file {source} does not suit the model ({error})"
            raise bad_record(describe(record, cause)) from error
        self._add_text(tape, self._template.image_start)
        tape.add_image([self._image_id] * count)
        self._add_text(tape, self._template.image_end)

    def _tokenize(self, text: str) -> Any:
        return self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    def _too_long(self, record: Record, length: int, what: str) -> Exception:
        cause = f"cutting its {length} tokens at data.max_length={self._max_length} {what}"
        return bad_record(describe(record, f"{cause}; raise data.max_length"))


def _image_id(tokenizer: Any, image_token: str | int, template: Template) -> int:
    if isinstance(image_token, int):
        return image_token
    if image_token not in tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizer does not know the image token {image_token!r}; "
            "add it as a special token, or name the model's own image token"
        )
    require_no_image(template, image_token)
    return tokenizer.convert_tokens_to_ids(image_token)


def _special_tokens(tokenizer: Any, image_token: str | int) -> re.Pattern[str]:
    """Return a pattern that finds the tokenizer's special tokens anywhere in a text."""
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(t.content for t in added if t.special)}
    special |= {image_token} if isinstance(image_token, str) else set()
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
