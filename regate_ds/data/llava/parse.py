"""Turn one raw record of a file into a checked one, or say what is wrong with it.

Images are opened here only to find the broken ones; the loader's workers decode them later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regate_ds.data.llava.clips import fault_of
from regate_ds.data.llava.formats.fields import require_text_alone, require_used, turns_of
from regate_ds.data.llava.formats.said import Medium, Said, require_plain
from regate_ds.data.llava.formats.sources import Sources, listed
from regate_ds.data.llava.formats.table import read_turns
from regate_ds.data.llava.formats.tools import tools_of
from regate_ds.data.llava.media import ImageSource, by_file
from regate_ds.data.llava.records import MARKER, Cause, Record, Turn


def id_of(raw: Any) -> str | None:
    """Return what a raw record calls itself."""
    found = raw.get("id") if isinstance(raw, dict) else None
    return None if found is None else str(found)


class Parser:
    """Turns the raw records of one file into checked ones."""

    def __init__(self, source: Path, name: str, sources: Sources, *, verify_images: bool) -> None:
        """Set up for one file; ``sources`` finds its images and videos."""
        self._source, self._name, self._verify_images = source, name, verify_images
        self._sources = sources

    def record(self, number: int, raw: Any) -> Record:
        """Return the checked record of that number in the file. A bad one raises its Cause."""
        if isinstance(raw, Cause):
            raise raw
        if not isinstance(raw, dict):
            raise Cause(f"is no object, but of type {type(raw).__name__}")
        require_used(raw)
        said = read_turns(turns_of(raw))
        system, spoken = _split_system(raw, said)
        turns = _turns(spoken, first=len(said) - len(spoken))
        media = self._media(raw, turns, [medium for each in said for medium in each.media])
        images = tuple(image for group in media for image in group)
        for run in by_file(images):
            if fault := fault_of(run[0], verify=self._verify_images):
                raise Cause(fault)
        return Record(
            key=(self._name, number),
            id=id_of(raw),
            images=images,
            images_per_marker=tuple(len(group) for group in media),
            turns=turns,
            source=self._source,
            system=system,
            tools=tools_of(raw),
        )

    def _media(
        self, raw: dict[str, Any], turns: tuple[Turn, ...], named: list[Medium]
    ) -> list[list[ImageSource]]:
        """Return the images of each marker, in the order of the markers."""
        markers = MARKER.findall("\n".join(turn.question for turn in turns))
        entries = _entries(raw, "image", "images", named)
        images = [self._sources.image(*each, number) for number, each in enumerate(entries)]
        videos = _entries(raw, "video", "videos", named)
        if not entries and not videos:
            require_text_alone(raw)
        if not images and "<video>" not in markers and len(markers) == len(videos):
            # As LLaVA-NeXT writes it: the frames stand where the question has <image>.
            markers = ["<video>"] * len(videos)
        for marker, entries in (("<image>", images), ("<video>", videos)):
            if markers.count(marker) != len(entries):
                raise Cause(
                    f"has {markers.count(marker)} {marker} in its questions "
                    f"for {len(entries)} {marker.strip('<>')} entries"
                )
        next_image, next_video = iter(images), iter(videos)
        return [
            [next(next_image)] if marker == "<image>" else self._sources.video(*next(next_video))
            for marker in markers
        ]


def _entries(
    raw: dict[str, Any], one: str, several: str, named: list[Medium]
) -> list[tuple[str, Any]]:
    """Return what stands for each image or video, with the field that it stands in."""
    own = listed(raw, one, several)
    places = [medium for medium in named if medium.kind == one]
    given = [medium.entry for medium in places if medium.entry is not None]
    if given and own:
        raise Cause(f"names {one}s both in its turns and in a field of its own; use one of them")
    if given:
        return [("content", entry) for entry in given]
    for number, medium in enumerate(places):
        if medium.index not in (None, number):
            raise Cause(
                f"has {one} {medium.index!r} of its list in place {number}; put it in order"
            )
    field = one if raw.get(one) else several
    return [(field, entry) for entry in own]


def _split_system(raw: dict[str, Any], said: list[Said]) -> tuple[str | None, list[Said]]:
    """Return the record's own system text, if it has one, and the turns after it."""
    field, turn = raw.get("system"), said[0].text if said and said[0].role == "system" else None
    if field is not None and not isinstance(field, str):
        raise Cause(f"has the system {field!r}, not a text")
    if field:
        require_plain("its system text", field)
    if field and turn:
        raise Cause("has both 'system' and a system turn; take one of them out")
    text = field or turn or None
    if text and (found := MARKER.search(text)):
        raise Cause(f"has a system text that holds {found.group()}")
    return text, said if turn is None else said[1:]


def _turns(said: list[Said], *, first: int) -> tuple[Turn, ...]:
    """Return the pairs of question and answer, in order. first: number of the first turn."""
    turns: list[Turn] = []
    asked: list[Said] = []
    for number, each in enumerate(said, first):
        asker = "tool" if turns and turns[-1].calls else "user"
        if each.role == "assistant" and asked:
            turns.append(_turn(number, asked, each))
            asked = []
        elif each.role == asker and (not asked or asker == "tool"):
            asked.append(each)
        else:
            expected = "assistant" if asked else asker
            raise Cause(f"turn {number} is from the {each.role} where the {expected} should speak")
    if asked or not turns:
        raise Cause(
            f"its {len(said)} turns do not pair up: every question needs an answer after it"
        )
    if not any(turn.learn for turn in turns):
        raise Cause("has no answer to learn: all of its turns say so")
    return tuple(turns)


def _turn(number: int, asked: list[Said], answer: Said) -> Turn:
    """Return a pair: a question, or what tools return, and an answer. number: the answer's."""
    results = tuple(each.message for each in asked if each.message)
    question = "" if results else asked[0].text
    if answer.message:
        return Turn(question, "", learn=answer.learn, results=results, calls=answer.message)
    if not answer.text.strip():
        raise Cause(f"turn {number} is an empty answer")
    if found := MARKER.search(answer.text):
        raise Cause(f"turn {number} is an answer that holds {found.group()}")
    return Turn(question, answer.text, answer.gold_spans, answer.learn, results)
