"""Write a record's text by a chat template, and find its answers in the text.

Few released templates mark their answers. So a record is rendered up to each of its questions, with
the prompt for an answer, and once as a whole. The whole must begin with each of the others, and go
on with the answer's own text, perhaps after white space, and a special token, which ends it, again
perhaps after white space. What is learnt is that text and that token: nothing before, and nothing
after.

Some templates write another prompt for an answer than they write before one that is there. Then
the text up to the question is rendered without, and what they write before an answer is found once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from regate_ds.data.chat.messages import OWN_TEMPLATE, Messages, messages_of
from regate_ds.data.llava.records import Record, SampleError, bad_record, describe

Apply = Callable[[list[Messages], bool], list[str]]
"""Renders conversations; the flag adds the prompt for an answer."""

_CHANGE = f"change the model's chat template, or {OWN_TEMPLATE}"

_DAY = "\ufdd0"
"""Stands for the date in a rendered text. Unicode keeps this code out of texts."""

_DATE = "strftime_now"

_PROBE = "\ufdd2"
"""An answer that a template cannot hold itself."""


@dataclass(frozen=True)
class AnswerPlace:
    """Where an answer lies in a rendered text; [start, end) counts characters."""

    start: int
    end: int
    """End of the answer's own text."""

    closed: int
    """End of the special token that ends it."""

    lead: int
    """Number of white characters that the template took off the answer's beginning."""

    length: int
    """Number of characters of the answer in the record."""


@dataclass(frozen=True)
class Rendered:
    """A record's text; each image is still one placeholder."""

    text: str
    answers: tuple[AnswerPlace | None, ...]
    """None for an answer that is not learnt, and that the template writes otherwise."""


class ChatTemplate:
    """Renders records by one template."""

    def __init__(
        self, source: str, apply: Apply, special: re.Pattern[str], placeholder: str | None = None
    ) -> None:
        """Set up for one template.

        source: the template. apply: renders by ``dated(source)``. special: finds the texts of
            special tokens. placeholder: what an image is in a content that is a text; None if
            contents are lists.

        ValueError if the template cannot be used for training.
        """
        self.source, self.placeholder = source, placeholder
        self._apply, self._special = apply, re.compile(rf"\s*(?:{special.pattern})")

        self.ending, self._head = self._probe()

    def _probe(self) -> tuple[str, str | None]:
        """Return what ends an answer, a special token at its end, and what stands before an answer
        if that is not the prompt for one.

        ValueError if the template cannot be used for training, with the cause.
        """
        texts = [("user", "q"), ("assistant", _PROBE)]
        said: Messages = [{"role": role, "content": text} for role, text in texts]
        if self.placeholder is None:
            said = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in said]
        head: str | None = None
        try:
            (prompt,), (whole,) = self._apply([said[:1]], True), self._apply([said], False)
            if not whole.startswith(prompt):
                (prompt,) = self._apply([said[:1]], False)
                head = whole[len(prompt) : whole.find(_PROBE)]
                prompt += head
            found = _find(prompt, whole, _PROBE, self._special)
        except Exception as error:  # noqa: BLE001 (a template may raise anything)
            raise ValueError(f"a chat template cannot be used for training ({error})") from error
        return whole[found.end : found.closed], head

    def prompt(self, record: Record, turn: int) -> str:
        """Return the text that a model reads before it answers a turn of a record that renders."""
        said = messages_of(record, placeholder=self.placeholder)
        end = len(said) - 2 * (len(record.turns) - turn) + 1
        (text,) = self._apply([said[:end]], True)
        return text

    def render_all(self, records: Sequence[Record]) -> list[Rendered | SampleError]:
        """Render each record, or return its error."""
        try:
            return list(self._render(records))
        except Exception as error:  # noqa: BLE001 (as above; the culprit is then found alone)
            if len(records) == 1:
                return [_as_sample_error(records[0], error)]
        return [each for record in records for each in self.render_all([record])]

    def _render(self, records: Sequence[Record]) -> list[Rendered]:
        said = [messages_of(record, placeholder=self.placeholder) for record in records]
        wholes = self._apply(said, False)
        asked = [
            messages[: len(messages) - 2 * left + 1]
            for messages, record in zip(said, records)
            for left in range(len(record.turns), 0, -1)
        ]
        prompts = iter(self._apply(asked, self._head is None))
        return [self._found(*found, prompts) for found in zip(records, wholes)]

    def _found(self, record: Record, whole: str, prompts: Iterator[str]) -> Rendered:
        """Return the record's text with the places of its answers; it takes a prompt for each."""
        if _DAY in whole:
            raise _Changed(
                "the chat template writes the day's date, so that its tokens would change from day "
                f"to day; give the record a system text, or {_CHANGE}"
            )
        starts = [f"{next(prompts)}{self._head or ''}" for _ in record.turns]
        answers: list[AnswerPlace | None] = []
        for number, turn in enumerate(record.turns):
            try:
                answers.append(self._place(whole, starts[number:], turn.answer, number + 1))
            except _Changed:
                if turn.learn:
                    raise
                answers.append(None)
        return Rendered(whole, tuple(answers))

    def _place(self, whole: str, starts: list[str], answer: str, number: int) -> AnswerPlace:
        """Find an answer. starts: the texts before it, and before each of those that follow."""
        if not whole.startswith(starts[0]):
            raise _Changed(
                f"the chat template changes what it wrote before answer {number} once more is "
                "said; give each answer a record of its own in which those before it have the loss "
                f"0, or {_CHANGE}"
            )
        ends_next = len(starts) > 1 and whole.startswith(starts[1])
        end = len(starts[1]) if ends_next else len(whole)
        start = len(starts[0])
        for text in (answer, answer.rstrip(), answer.lstrip(), answer.strip()):
            at = whole.find(text + self.ending, start, end)
            if at >= 0 and not whole[start:at].strip():
                return _placed(answer, text, at, at + len(text) + len(self.ending))
        found = _find(starts[0], whole[:end], answer, self._special, number)
        raise _Changed(
            f"the chat template writes {_short(whole[found.end : found.closed])} behind answer "
            f"{number}, and {self.ending!r} behind one that is the last; give each answer a "
            f"record of its own in which those before it have the loss 0, or {_CHANGE}"
        )


class _Changed(ValueError):
    """Why a record's text cannot be used."""


def dated(source: str) -> str:
    """Return a template that writes ``_DAY`` where it would write a date."""
    if _DATE not in source:
        return source
    return f"{{%- macro {_DATE}(form) -%}}{_DAY}{{%- endmacro -%}}{source}"


def default_of(source: str | dict[str, str], owner: str) -> str:
    """Return a chat template, or the one named "default" of several. ValueError if none is."""
    if isinstance(source, str):
        return source
    if "default" not in source:
        raise ValueError(
            f"{owner} has the chat templates {sorted(source)}, none of which is 'default'; give "
            "its folder one chat_template.jinja"
        )
    return source["default"]


def _find(
    prompt: str, whole: str, answer: str, special: re.Pattern[str], number: int = 1
) -> AnswerPlace:
    """Find an answer behind its prompt. ``_Changed`` if it is not there, or nothing ends it."""
    behind = whole[len(prompt) :]
    places = {text: behind.find(text) for text in (answer, answer.strip())}
    texts = [text for text, at in places.items() if at >= 0 and not behind[:at].strip()]
    if not texts:
        raise _Changed(
            f"the chat template writes {_short(behind)} for answer {number}, {_short(answer)}; "
            f"correct the answer, or {_CHANGE}"
        )
    start = len(prompt) + places[texts[0]]
    end = start + len(texts[0])
    token = special.match(whole, end)
    if token is None:
        raise _Changed(
            f"the chat template writes {_short(whole[end:])} behind answer {number}, which no "
            f"special token ends, so that a model would not learn to stop; {_CHANGE}"
        )
    return _placed(answer, texts[0], start, token.end())


def _placed(answer: str, text: str, start: int, closed: int) -> AnswerPlace:
    """Return the place of an answer's ``text``, which the template may have stripped."""
    return AnswerPlace(start, start + len(text), closed, answer.find(text), len(answer))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _as_sample_error(record: Record, error: Exception) -> SampleError:
    if isinstance(error, SampleError):
        return error
    cause = f"{error}"
    if not isinstance(error, _Changed):
        cause = f"the chat template refuses it ({type(error).__name__}: {error})"
    return bad_record(describe(record, cause))
