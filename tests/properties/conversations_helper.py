"""Draws conversations, and writes each down in any of the formats of data files.

What a conversation means is known before it is written, so it is the oracle of what is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from regate_ds.data.llava.records import Record, Turn

IMAGES = ("a.png", "b.png")
CLIP = ("clip/1.png", "clip/2.png")
"""The frames of the video "clip"."""

MEANS_MORE = re.compile(r"<image>|<video>|<(img|video|audio|image)>[^<>]*</\1>")

plain_texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from(
            ["<image", "image>", "\u2028", "\r\n", "\ufeff", '"', "\\", "<img>", "🙂", "{}"]
        ),
    ),
    max_size=3,
).map("".join)
plain_texts = plain_texts.filter(lambda text: not MEANS_MORE.search(text))
answers = plain_texts.filter(str.strip)

Piece = tuple[str, str]
"""A part of a question: ("text", the text), ("image", its file) or ("video", its folder)."""

_pieces = st.one_of(
    plain_texts.map(lambda text: ("text", text)),
    st.sampled_from(IMAGES).map(lambda name: ("image", name)),
    st.just(("video", "clip")),
)


@dataclass(frozen=True)
class Pair:
    question: tuple[Piece, ...]
    answer: str
    learn: bool
    gold_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Conversation:
    pairs: tuple[Pair, ...]
    system: str | None
    id: str | int | None

    def record(self, number: int, source: Path) -> Record:
        """Return what a reader must make of it."""
        shown = [p for pair in self.pairs for p in pair.question if p[0] != "text"]
        files = [[name] if kind == "image" else list(CLIP) for kind, name in shown]
        return Record(
            key=("set", number),
            id=None if self.id is None else str(self.id),
            images=tuple(source.parent / name for group in files for name in group),
            images_per_marker=tuple(map(len, files)),
            turns=tuple(
                Turn(_marked(one.question), one.answer, one.gold_spans, one.learn)
                for one in self.pairs
            ),
            source=source,
            system=self.system or None,
        )


@st.composite
def _drawn_pair(draw: Callable[..., Any]) -> Pair:
    question = draw(st.lists(_pieces, max_size=4))
    answer = draw(answers)
    cuts = st.tuples(st.integers(0, len(answer)), st.integers(0, len(answer)))
    spans = draw(st.lists(cuts.map(sorted).filter(lambda c: c[0] < c[1]).map(tuple), max_size=2))
    return Pair(tuple(question), answer, draw(st.booleans()), tuple(spans))


_some_pairs = st.lists(_drawn_pair(), min_size=1, max_size=3).map(tuple)
conversations = st.builds(
    Conversation,
    pairs=_some_pairs.filter(
        # A text that ends in "<ima" and one that begins with "ge>" say a third thing together.
        lambda pairs: (
            any(one.learn for one in pairs) and all(_is_as_drawn(one.question) for one in pairs)
        )
    ),
    system=st.none() | plain_texts,
    id=st.none() | st.integers() | plain_texts,
)


def _marked(question: tuple[Piece, ...]) -> str:
    return "".join(name if kind == "text" else f"<{kind}>" for kind, name in question)


def _is_as_drawn(question: tuple[Piece, ...]) -> bool:
    found = [match.group() for match in MEANS_MORE.finditer(_marked(question))]
    return found == [f"<{kind}>" for kind, _ in question if kind != "text"]


@st.composite
def written(draw: Callable[..., Any], said: Conversation) -> dict[str, Any]:
    """Write a conversation in one of the formats, with fields beside it that say nothing."""
    is_llava, is_typed = draw(st.sampled_from([(True, False), (False, False), (False, True)]))
    names_files = is_typed and draw(st.booleans())
    turns = []
    system_field = said.system is not None and draw(st.booleans())
    if said.system is not None and not system_field:
        turns.append(_turn(is_llava, "system", said.system))
    for pair in said.pairs:
        content = _marked(pair.question)
        if is_typed:
            content = [_part(draw, kind, name, names_files) for kind, name in pair.question]
        turns.append(_turn(is_llava, draw(st.sampled_from(_ASKS[is_llava])), content))
        word = draw(st.sampled_from(("gpt", "assistant") if is_llava else ("assistant",)))
        turns.append(_turn(is_llava, word, pair.answer) | _fields_of_answer(draw, pair))
    raw: dict[str, Any] = {"conversations" if is_llava else "messages": turns}
    if system_field:
        raw["system"] = said.system
    if not names_files:
        raw |= _lists(draw, said)
    if said.id is not None or draw(st.booleans()):
        raw["id"] = said.id
    return raw | draw(st.sampled_from(_SAYS_NOTHING))


_ASKS = {True: ("human", "user"), False: ("user",)}

_SAYS_NOTHING: list[dict[str, Any]] = [
    {},
    {"source": "web", "height": 7},
    {"tools": None, "audio": None, "history": []},
    {"rejected": "", "objects": {}, "width": [1]},
]


def _turn(is_llava: bool, role: str, said: Any) -> dict[str, Any]:
    return {"from": role, "value": said} if is_llava else {"role": role, "content": said}


def _fields_of_answer(draw: Callable[..., Any], pair: Pair) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if not pair.learn or draw(st.booleans()):
        name = draw(st.sampled_from(["loss", "weight", "train", "training"]))
        fields[name] = draw(st.sampled_from([pair.learn, int(pair.learn), float(pair.learn)]))
    if pair.gold_spans or draw(st.booleans()):
        fields["gold_spans"] = [list(span) for span in pair.gold_spans]
    return fields


def _part(draw: Callable[..., Any], kind: str, name: str, names_files: bool) -> dict[str, Any]:
    if kind == "text":
        return {"type": "text", "text": name}
    if not names_files:
        return {"type": kind}
    forms: list[dict[str, Any]] = [
        {"type": kind, kind: name},
        {"type": kind, "path": name, "url": None},
        {"type": f"{kind}_url", f"{kind}_url": {"url": name}},
        {"type": f"{kind}_url", f"{kind}_url": f"file://{name}"},
    ]
    return draw(st.sampled_from(forms))


def _lists(draw: Callable[..., Any], said: Conversation) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("image", "video"):
        names = [name for pair in said.pairs for k, name in pair.question if k == kind]
        forms: list[dict[str, Any]] = [{kind: names}, {f"{kind}s": names}]
        if len(names) == 1:
            forms += [{kind: names[0]}, {f"{kind}s": names[0]}]
        if not names:
            forms = [{}, {kind: None}, {f"{kind}s": []}]
        found |= draw(st.sampled_from(forms))
    return found


@st.composite
def files(draw: Callable[..., Any], records: list[Any]) -> tuple[str, bytes]:
    """Write records as a file: its suffix and its bytes."""
    is_ascii = draw(st.booleans()) or not _is_unicode(json.dumps(records, ensure_ascii=False))
    mark = draw(st.sampled_from(["", "\ufeff"]))
    if draw(st.booleans()):
        indent = draw(st.sampled_from([None, 1]))
        text = json.dumps(records, ensure_ascii=is_ascii, indent=indent)
        around = draw(st.sampled_from(["", " \n", "\r\n\t"]))
        return ".json", f"{mark}{around}{text}{around}".encode()
    ends = [draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"])) for _ in records]
    lines = [json.dumps(one, ensure_ascii=is_ascii) + end for one, end in zip(records, ends)]
    text = "".join(lines)
    return ".jsonl", f"{mark}{text.rstrip() if draw(st.booleans()) else text}".encode()


def _is_unicode(text: str) -> bool:
    """Return whether a text holds whole characters only."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
