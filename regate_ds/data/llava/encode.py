"""Turn a record into token ids, and mark its image positions and its answer tokens.

Shapes: S positions of one sample, B rows, T positions of a row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict
from typing import Any

from torch import Tensor

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.llava.images import sizes_of
from regate_ds.data.llava.media import ImageSource
from regate_ds.data.llava.records import Record, SampleError, bad_record, describe
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.data.llava.tape import Tape, Tokens
from regate_ds.data.llava.template import Template, prompt, require_no_image, text_segments
from regate_ds.data.tokens import require_no_special, rules_of, special_tokens

_PROBED = (8, 28, 60, 224, 336, 448, 500, 1000, 2048, 5000)
"""Widths and heights by which one rule for an image's tokens is told from another."""


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
        # The tokenizer looks its ids up anew each time.
        self._bos_id, self._eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._image_id = _image_id(tokenizer, image_token, template)
        more = (image_token,) if isinstance(image_token, str) else ()
        self._special = special_tokens(tokenizer, *more)
        self._num_image_tokens = num_image_tokens
        self._max_length = max_length
        self._template = template
        self._images_apart = False

    def with_images_apart(self) -> Encoder:
        """Make the encoder for a model that takes placeholders that touch for one image.

        A record whose images touch is then a bad one.
        """
        other = copy(self)
        other._images_apart = True
        return other

    def encode(self, record: Record) -> EncodedSample:
        """Encode one record; only the sizes of its images are read. SampleError if it is bad."""
        return self._sample(record, self._write(record, self._tokenize))

    def encode_all(self, records: Sequence[Record]) -> Iterator[EncodedSample | SampleError]:
        """Yield each record encoded, or its error; all their texts are tokenised in one call.

        This is for an index of the samples: ``char_spans`` are left empty.
        """
        texts = {text: None for one in records for text in text_segments(one, self._template)}
        tokens_of = self._tokenize_all(list(texts))
        for record in records:
            try:
                yield self._sample(record, self._write(record, tokens_of.__getitem__))
            except SampleError as error:
                yield error

    @property
    def takes_videos(self) -> bool:
        """No: each frame is an image."""
        return False

    @property
    def end_ids(self) -> list[int]:
        """Id of the eos, which ends each answer."""
        return [self._eos_id]

    def prompt(self, record: Record, sample: EncodedSample, turn: int) -> tuple[Tensor, Tensor]:
        """Return ids [S] and image numbers [S] of what a model reads before it answers a turn."""
        length = sample.answer_start(turn)
        return sample.input_ids_S[:length], sample.image_S[:length]

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

    def settings(self) -> dict[str, Any]:
        """Return what decides the tokens of a record, as JSON can hold it.

        The rule that counts an image's tokens is told by its results for some sizes.
        """
        return {
            "tokenizer": rules_of(self._tokenizer),
            "ids": [self._bos_id, self._eos_id, self._image_id],
            "special": self._special.pattern,
            "max_length": self._max_length,
            "template": asdict(self._template),
            "image_tokens": [self._counted((w, h)) for w in _PROBED for h in _PROBED],
            **({"images_apart": True} if self._images_apart else {}),
        }

    def is_cut(self, sample: EncodedSample) -> bool:
        """Return whether ``max_length`` may have cut the sample's end off."""
        return len(sample) >= self._max_length

    def begins_with_answer(self, record: Record) -> bool:
        """Return whether the sample's first token is an answer's, so that no token predicts it."""
        return self._bos_id is None and prompt(record, 0, self._template) == [""]

    def _sample(self, record: Record, tape: Tape) -> EncodedSample:
        length = min(len(tape.ids), self._max_length)
        if self._images_apart and tape.images_touch():
            cause = (
                "has two images or frames with nothing between them, which this model takes for "
                "one; set data.template.image_start and image_end, such as '<|vision_start|>' and "
                "'<|vision_end|>', or write a text between them"
            )
            raise bad_record(describe(record, cause))
        if tape.cuts_an_image(length):
            raise self._too_long(record, len(tape.ids), "would cut an image's placeholders off")
        sample = tape.sample(record, length)
        if not bool((sample.labels_S != IGNORE).any()):
            raise self._too_long(record, len(tape.ids), "leaves no answer token to learn from")
        return sample

    def _write(self, record: Record, tokens_of: Callable[[str], Tokens]) -> Tape:
        require_no_special(record, self._special)
        if record.uses_tools:
            cause = "uses tools, which only chat templates write; set data.template=null"
            raise bad_record(describe(record, cause))
        tape = Tape()
        if self._bos_id is not None:
            tape.add([self._bos_id])
        media = iter(record.images_per_marker)
        images = sizes_of(record)
        start, end = self._template.image_start, self._template.image_end

        def add_text(text: str) -> None:
            if text:
                tape.add(tokens_of(text)[0])

        for number, turn in enumerate(record.turns):
            first, *others = prompt(record, number, self._template)
            add_text(first)
            for text in others:
                for _ in range(next(media)):
                    count = self._count(record, *next(images), tape)
                    add_text(start)
                    tape.images.append(tape.add([self._image_id] * count))
                    add_text(end)
                add_text(text)
            tokens = tokens_of(turn.answer)
            if turn.learn:
                tape.add_answer(number, turn.answer, tokens, self._eos_id)
            else:
                tape.add([*tokens[0], self._eos_id])
        return tape

    def _count(self, record: Record, source: ImageSource, size: tuple[int, int], tape: Tape) -> int:
        """Return an image's number of placeholders, and note its size."""
        tape.sizes.append(size)
        try:
            return self._num_image_tokens(size)
        except ValueError as error:
            cause = f"image file {source} does not suit the model ({error})"
            raise bad_record(describe(record, cause)) from error

    def _counted(self, size: tuple[int, int]) -> int | str:
        try:
            return self._num_image_tokens(size)
        except ValueError as error:
            return str(error)

    def _tokenize(self, text: str) -> Tokens:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def _tokenize_all(self, texts: list[str]) -> dict[str, Tokens]:
        """Return the tokens of each text without their places."""
        if not texts:
            return {}
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return {text: (ids, None) for text, ids in zip(texts, found["input_ids"])}

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
