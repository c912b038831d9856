"""Turn a record into the tokens of its model's own processor, and mark its images and answers.

Shapes: S positions of one sample, N label positions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.chat.image_text import ImageWriter, OtherPatches
from regate_ds.data.chat.label import PlacedTokens, label, repeat_patches
from regate_ds.data.chat.messages import OWN_TEMPLATE
from regate_ds.data.chat.render import ChatTemplate, Rendered
from regate_ds.data.chat.texts import IMAGE, eos_of, template_of_texts
from regate_ds.data.chat.write import Written, write
from regate_ds.data.llava.clips import VisualShape, frame_size, shapes_of
from regate_ds.data.llava.media import Video
from regate_ds.data.llava.records import Record, SampleError, bad_record, describe
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.data.tokens import require_no_special, rules_of, special_tokens


class ChatEncoder:
    """Writes records as tokens by a chat template, with a fast tokenizer.

    The whole text of a sample is tokenised at once, as the processor does it, so that what is
    merged at an answer's border is merged here. Samples are cut at ``max_length`` tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: ChatTemplate,
        images: ImageWriter,
        max_length: int,
        other_ending: str | None = None,
    ) -> None:
        """Set up for one model. other_ending: what ends an answer in the place of the template's
        own token. ValueError if the token of a patch is none that the tokenizer reads by itself.
        """
        if images.patch not in tokenizer.get_added_vocab():
            raise ValueError(
                f"the tokenizer has {images.patch!r}, which stands for a patch of an image, not "
                "among its added tokens; add it as a special token"
            )
        self._tokenizer = tokenizer
        self._bos = tokenizer.bos_token
        self._template, self._images = template, images
        patches = dict.fromkeys(filter(None, (images.patch, images.video_patch)))
        self._patch_ids = [tokenizer.convert_tokens_to_ids(patch) for patch in patches]
        self._max_length = max_length
        self._other_ending = other_ending
        self._special = special_tokens(tokenizer, images.placeholder, images.patch)

    takes_videos = True
    """The processor chooses their frames, or they are refused."""

    @property
    def end_ids(self) -> list[int]:
        """Ids of the token that ends an answer, and of the tokenizer's eos."""
        ids = [
            self._tokenizer.convert_tokens_to_ids(self._template.ending.strip()),
            self._tokenizer.eos_token_id,
        ]
        return list(dict.fromkeys(one for one in ids if one is not None))

    def encode(self, record: Record) -> EncodedSample:
        """Encode one record; only the sizes of its images are read. SampleError if it is bad."""
        (sample,) = self._encode([record], with_spans=True)
        if isinstance(sample, SampleError):
            raise sample
        return sample

    def encode_all(self, records: Sequence[Record]) -> Iterator[EncodedSample | SampleError]:
        """Yield each record encoded, or its error; all their texts are tokenised in one call.

        This is for an index of the samples: ``char_spans`` are left empty.
        """
        yield from self._encode(records, with_spans=False)

    def prompt(self, record: Record, sample: EncodedSample, turn: int) -> tuple[Tensor, Tensor]:
        """Return ids [S] and image numbers [S] of what a model reads before it answers a turn."""
        text, images = self._template.prompt(record, turn), self._images
        shapes, kinds = shapes_of(record), {images.placeholder, images.video_placeholder}
        shown = shapes[: sum(text.count(kind) for kind in kinds if kind)]
        written = self._expand(record, Rendered(text, ()), shown)
        (found,) = self._tokenize([written.text])
        tokens = self._repeat(record, written, *found)
        return torch.from_numpy(tokens.ids_S), torch.from_numpy(tokens.image_S)

    def uncut(self, tokenizer: Any = None, *, placeholder_id: int | None = None) -> ChatEncoder:
        """Make an encoder of the same record without ``max_length``.

        A tokenizer with a chat template of its own writes the record by that; another one writes
        the text of this encoder's, with its own eos behind each answer. ValueError if it has none,
        or if its template cannot be used.
        """
        if tokenizer is None:
            return ChatEncoder(
                self._tokenizer,
                template=self._template,
                images=self._images,
                max_length=sys.maxsize,
                other_ending=self._other_ending,
            )
        patch, own = tokenizer.convert_ids_to_tokens(placeholder_id), tokenizer.chat_template
        kinds = self._images.placeholder, self._images.video_placeholder
        placeholder, video_placeholder = kinds if own is None else (IMAGE, IMAGE)
        return ChatEncoder(
            tokenizer,
            template=self._template if own is None else template_of_texts(tokenizer),
            images=OtherPatches(
                self._images,
                placeholder=placeholder,
                video_placeholder=video_placeholder,
                patch=patch,
            ),
            max_length=sys.maxsize,
            other_ending=eos_of(tokenizer) if own is None else None,
        )

    def settings(self) -> dict[str, Any]:
        """Return what decides the tokens of a record, as JSON can hold it."""
        return {
            "tokenizer": rules_of(self._tokenizer),
            "ids": [*self._patch_ids, *self.end_ids],
            "named": {name: str(text) for name, text in self._tokenizer.special_tokens_map.items()},
            "special": self._special.pattern,
            "max_length": self._max_length,
            "chat_template": self._template.source,
            "processor": self._images.settings(),
        }

    def is_cut(self, sample: EncodedSample) -> bool:
        """Return whether ``max_length`` may have cut the sample's end off."""
        return len(sample) >= self._max_length

    def begins_with_answer(self, record: Record) -> bool:
        """Return whether the sample's first token is an answer's, so that no token predicts it."""
        (rendered,) = self._template.render_all([record])
        first = rendered.answers[0] if isinstance(rendered, Rendered) else None
        return first is not None and first.start == 0 and self._bos is None

    def _encode(
        self, records: Sequence[Record], *, with_spans: bool
    ) -> list[EncodedSample | SampleError]:
        texts = self._write(records)
        found = iter(self._tokenize([one.text for one in texts if isinstance(one, Written)]))
        samples: list[EncodedSample | SampleError] = []
        for record, text in zip(records, texts):
            if isinstance(text, SampleError):
                samples.append(text)
                continue
            try:
                tokens = self._repeat(record, text, *next(found))
                samples.append(self._sample(record, text, tokens, with_spans=with_spans))
            except SampleError as error:
                samples.append(error)
        return samples

    def _write(self, records: Sequence[Record]) -> list[Written | SampleError]:
        written: list[Written | SampleError] = []
        for record, rendered in zip(records, self._template.render_all(records)):
            try:
                require_no_special(record, self._special)
                self._require_writable(record)
                if isinstance(rendered, SampleError):
                    raise rendered
                written.append(self._expand(record, rendered, shapes_of(record)))
            except SampleError as error:
                written.append(error)
        return written

    def _require_writable(self, record: Record) -> None:
        why = self._images.no_videos
        if why is not None and any(isinstance(source, Video) for source in record.images):
            cause = f"has a video ({why}); give its frames as images, or {OWN_TEMPLATE}"
            raise bad_record(describe(record, cause))

    def _expand(self, record: Record, rendered: Rendered, shapes: list[VisualShape]) -> Written:
        try:
            return write(rendered, self._images, shapes, ending=self._other_ending)
        except ValueError as error:
            cause = f"what it shows does not suit the model ({error})"
            raise bad_record(describe(record, cause)) from error

    def _tokenize(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids and their places [start, end) in the characters, as the processor's call."""
        if not texts:
            return []
        writes_bos = {self._bos is not None and text.startswith(self._bos) for text in texts}
        if len(writes_bos) > 1:
            return [found for text in texts for found in self._tokenize([text])]
        # A processor adds a bos to a text that has none, a tokenizer does not.
        adds = self._template.placeholder is None and writes_bos == {False}
        found = self._tokenizer(
            texts,
            add_special_tokens=adds,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        flat = (chain.from_iterable(places) for places in found["offset_mapping"])
        return [
            (np.fromiter(ids, np.int64), np.fromiter(places, np.int64).reshape(-1, 2))
            for ids, places in zip(found["input_ids"], flat)
        ]

    def _sample(
        self, record: Record, written: Written, tokens: PlacedTokens, *, with_spans: bool
    ) -> EncodedSample:
        ids_S, image_S = tokens.ids_S, tokens.image_S
        length = min(len(ids_S), self._max_length)
        if length < len(ids_S) and (image_S[length:] >= 0).any():
            raise self._too_long(record, len(ids_S), "would cut an image's placeholders off")
        labels_S, spans = label(written, record.turns, tokens, length, with_spans=with_spans)
        if not (labels_S != IGNORE).any():
            raise self._too_long(record, len(ids_S), "leaves no answer token to learn from")
        return EncodedSample(
            key=record.key,
            input_ids_S=torch.from_numpy(ids_S[:length]),
            labels_S=torch.from_numpy(labels_S),
            image_S=torch.from_numpy(image_S[:length]),
            char_spans=tuple(spans),
            images=tuple(written.sources(record.images, self._images)),
            image_sizes=tuple(frame_size(shape) for shape in written.shapes),
        )

    def _repeat(
        self, record: Record, written: Written, ids_S: np.ndarray, places_S2: np.ndarray
    ) -> PlacedTokens:
        try:
            return repeat_patches(written, ids_S, places_S2, self._patch_ids)
        except ValueError as error:
            raise bad_record(describe(record, str(error))) from error

    def _too_long(self, record: Record, length: int, what: str) -> SampleError:
        cause = f"cutting its {length} tokens at data.max_length={self._max_length} {what}"
        return bad_record(describe(record, f"{cause}; raise data.max_length"))
