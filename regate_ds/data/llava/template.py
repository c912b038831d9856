"""The template of a record's text: what is around its questions, answers and images."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from regate_ds.data.llava.records import MARKER, Record


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text around questions, answers and images. An answer ends with the tokenizer's eos."""

    system: str = ""
    """Before the first question, where a record has no system text of its own."""

    system_start: str = ""
    """Before a record's own system text, which stands in the place of `system`."""

    system_end: str = " "
    """After a record's own system text."""

    user: str = "USER: "
    """Before every question."""

    assistant: str = " ASSISTANT: "
    """Between a question and its answer."""

    separator: str = " "
    """Between an answer's eos and the next question."""

    image_start: str = ""
    """Before the placeholders of every image, and of every frame of a video."""

    image_end: str = ""
    """After the placeholders of every image, and of every frame of a video."""


def prompt(record: Record, number: int, template: Template) -> list[str]:
    """Return the text between the answer before and this turn's, cut at its image markers."""
    before = template.separator if number else _system(record, template)
    question = record.turns[number].question
    return MARKER.split(f"{before}{template.user}{question}{template.assistant}")


def _system(record: Record, template: Template) -> str:
    if record.system is None:
        return template.system
    return f"{template.system_start}{record.system}{template.system_end}"


def text_segments(record: Record, template: Template) -> list[str]:
    """Return each text of a record that the tokenizer gets, as to train a tokenizer on."""
    segments = [template.image_start, template.image_end] * len(record.images)
    for number, turn in enumerate(record.turns):
        segments += [*prompt(record, number, template), turn.answer]
    return [segment for segment in segments if segment]


def require_no_image(template: Template, image_token: str) -> None:
    """Refuse, by ValueError, a template whose own text holds an image token or marker."""
    for name, text in asdict(template).items():
        if image_token in text or MARKER.search(text):
            raise ValueError(
                f"data.template.{name}={text!r} stands for an image; take the token out, because "
                "images belong where a question has its marker"
            )
