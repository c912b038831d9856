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

from regate_ds.data.chat.messages import OWN_TEMPLATE, Messages, answers_in, messages_of
from regate_ds.data.chat.source import DAY
from regate_ds.data.chat.tool_text import unwritten_tools
from regate_ds.data.llava.records import Record, SampleError, bad_record, describe

Apply = Callable[[list[Messages], bool, str | None], list[str]]
"""Renders conversations; the flag adds the prompt for an answer. The text is the tools, as JSON."""

_CHANGE = f"change the model's chat template, or {OWN_TEMPLATE}"

_CHANGE_TOOLS = "change the model's chat template, or leave the record out"

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
            (prompt,) = self._apply([said[:1]], True, None)
            (whole,) = self._apply([said], False, None)
            if not whole.startswith(prompt):
                (prompt,) = self._apply([said[:1]], False, None)
                head = whole[len(prompt) : whole.find(_PROBE)]
                prompt += head
            found = _find(prompt, whole, _PROBE, self._special)
        except Exception as error:  # noqa: BLE001 (a template may raise anything)
            raise ValueError(f"a chat template cannot be used for training ({error})") from error
        return whole[found.end : found.closed], head

    def prompt(self, record: Record, turn: int) -> str:
        """Return the text that a model reads before it answers a turn of a record that renders."""
        said = messages_of(record, placeholder=self.placeholder)
        (text,) = self._apply([said[: answers_in(said)[turn]]], True, record.tools)
        return text

    def render_all(self, records: Sequence[Record]) -> list[Rendered | SampleError]:
        """Render each record, or return its error."""
        # One call takes the tools of one record.
        if len(records) == 1 or not any(record.tools for record in records):
            try:
                return list(self._render(records))
            except Exception as error:  # noqa: BLE001 (as above; the culprit is then found alone)
                if len(records) == 1:
                    return [_as_sample_error(records[0], error)]
        return [each for record in records for each in self.render_all([record])]

    def _render(self, records: Sequence[Record]) -> list[Rendered]:
        said = [messages_of(record, placeholder=self.placeholder) for record in records]
        tools = records[0].tools if records else None
        wholes = self._apply(said, False, tools)
        asked = [one[:place] for one in said for place in answers_in(one)]
        prompts = iter(self._apply(asked, self._head is None, tools))
        calls = [one[: place + 1] for one in said for place in answers_in(one, calls=True)]
        called = iter(self._apply(calls, False, tools) if calls else ())
        return [self._found(*found, prompts, called) for found in zip(records, wholes)]

    def _found(
        self, record: Record, whole: str, prompts: Iterator[str], called: Iterator[str]
    ) -> Rendered:
        """Return the record's text with the places of its answers.

        It takes a prompt for each, and for each that calls tools the text with it as the last.
        """
        if DAY in whole:
            raise _Changed(
                "the chat template writes the day's date, so that its tokens would change from day "
                f"to day; give the record a system text, or {_CHANGE}"
            )
        starts = [f"{next(prompts)}{self._head or ''}" for _ in record.turns]
        untils = [None if turn.calls is None else next(called) for turn in record.turns]
        written = [until and until[len(start) :] for start, until in zip(starts, untils)]
        lack = record.uses_tools and unwritten_tools(record, starts[0], whole, written)
        if lack:
            raise _Changed(f"the chat template does not write {lack}; {_CHANGE_TOOLS}")
        answers: list[AnswerPlace | None] = []
        for number, (turn, until) in enumerate(zip(record.turns, untils)):
            try:
                if until is not None:
                    answers.append(self._place_calls(whole, starts[number], until, number + 1))
                    continue
                answers.append(self._place(whole, starts[number:], turn.answer, number + 1))
            except _Changed:
                if turn.learn:
                    raise
                answers.append(None)
        return Rendered(whole, tuple(answers))

    def _place_calls(self, whole: str, start: str, until: str, number: int) -> AnswerPlace:
        """Find an answer that calls tools: all that the template writes for it, to its end."""
        if not (whole.startswith(until) and until.startswith(start)):
            raise _Changed(
                f"the chat template changes answer {number}, which calls tools, once more is said; "
                f"{_CHANGE_TOOLS}"
            )
        end = until.rfind(self.ending, len(start))
        closed = end + len(self.ending)
        if end < 0 or until[closed:].strip():
            raise _Changed(
                f"the chat template writes {_short(until[len(start) :])} for answer {number}, a "
                f"call of tools, without {self.ending!r} at its end; {_CHANGE_TOOLS}"
            )
        return AnswerPlace(len(start), end, closed, lead=0, length=0)

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
