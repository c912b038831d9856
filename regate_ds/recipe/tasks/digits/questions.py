"""The questions and answers about a digit scene, and which words need the image.

A question fixes how its answer is phrased, so that a reader without the image can predict every
word but the gold ones. No gold word follows from the question, from an earlier answer, or from the
order of the answer: digits are described in an order that reveals none of the answer's properties.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from regate_ds.recipe.tasks.answers import Answer, QuestionAnswer, fill

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNT_WORDS = ("none", "one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "central", "right")


class Shown(NamedTuple):
    """One digit of a scene, in the words of the answers."""

    digit: str
    colour: str
    size: str
    row: str
    column: str


_DESCRIBE = {
    "picture": (
        (
            "Describe the digits, row by row.",
            "The picture shows {count} digits.",
            " The {ordinal} digit is {size} and {colour}, and it is the number {digit}.",
        ),
        (
            "Read the digits from the top to the bottom.",
            "I can read {count} digits here.",
            " The {ordinal} number is {digit}, it has the colour {colour} and its size is {size}.",
        ),
    ),
    "clip": (
        (
            "Describe the digits in the order in which they appear.",
            "The clip shows {count} digits.",
            " The {ordinal} digit is {size} and {colour}, and it is the number {digit}.",
        ),
        (
            "Which digits appear, and in which order?",
            "There are {count} digits that appear here.",
            " The {ordinal} number is {digit}, it has the colour {colour} and its size is {size}.",
        ),
    ),
}

_WHERE_ALL = (
    (
        "Where are the numbers {names}?",
        "The number {digit} is in the {row} row and in the {column} column.",
    ),
    (
        "Tell me the places and the colours of the numbers {names}.",
        "The number {digit} has the colour {colour}, and its place is {row} {column}.",
    ),
)

_ABOUT_DIGIT = (
    (
        "Where is the number {digit}?",
        "The number {digit} is in the {row} row and in the {column} column, and it is {size}.",
    ),
    (
        "What colour is the number {digit}?",
        "The number {digit} has the colour {colour}, and its size is {size}.",
    ),
    (
        "Describe the number {digit}.",
        "The number {digit} is {size} and {colour}. Its place is {row} {column}.",
    ),
)

_ABOUT_PLACE = (
    (
        "Which digit is in the {row} row and in the {column} column?",
        "The digit in this place is the number {digit}, and it has the colour {colour}.",
    ),
    (
        "What can you read at the place {row} {column}?",
        "I can read the number {digit} at this place. It is {size} and its colour is {colour}.",
    ),
)

_ABOUT_COLOUR = (
    (
        "Which digit is {colour}?",
        "The {colour} digit is the number {digit}. It is in the {row} row, {column} column.",
    ),
    (
        "What can you tell me about the {colour} digit?",
        "The {colour} digit is the number {digit}. It is {size}, and its place is {row} {column}.",
    ),
)

_COUNT = ("How many digits are there?", "There are {count} digits that I can see here.")

_COUNT_LARGE = (
    "How many digits are there, and how many of them are large?",
    "There are {count} digits here, and the number of the large digits is {large}.",
)


def ask(scene: list[Shown], medium: str, rng: Random) -> list[QuestionAnswer]:
    """Return one or several turns about one scene; ``medium`` is "picture" or "clip".

    ``scene`` is in the order in which a description names the digits. Digits differ; all other
    properties may repeat.
    """
    kind = rng.random()
    if kind < 0.25:
        return [_describe(scene, medium, rng)]
    if kind < 0.45:
        return [_where_all(scene, rng)]
    if kind < 0.65:
        return [_about_one(rng.choice(scene), scene, rng)]
    if kind < 0.75:
        return [_count(_COUNT_LARGE, scene)]
    # Several turns speak of different digits, so that no turn answers a later one.
    count = [] if kind < 0.85 else [_count(_COUNT, scene)]
    named = rng.sample(scene, 1 if count and rng.random() < 0.5 else 2)
    return count + [_about_one(shown, scene, rng) for shown in named]


def _describe(scene: list[Shown], medium: str, rng: Random) -> QuestionAnswer:
    question, opening, sentence = rng.choice(_DESCRIBE[medium])
    answer = fill(opening, {}, {"count": COUNT_WORDS[len(scene)]})
    for ordinal, shown in zip(ORDINALS, scene):
        answer += fill(sentence, {"ordinal": ordinal}, shown._asdict())
    return question, answer


def _where_all(scene: list[Shown], rng: Random) -> QuestionAnswer:
    question, sentence = rng.choice(_WHERE_ALL)
    named = rng.sample(scene, len(scene))
    names = [shown.digit for shown in named]
    answer = Answer()
    for number, shown in enumerate(named):
        answer += fill(" " * (number > 0) + sentence, {"digit": shown.digit}, shown._asdict())
    return question.format(names=", ".join(names[:-1]) + " and " + names[-1]), answer


def _about_one(shown: Shown, scene: list[Shown], rng: Random) -> QuestionAnswer:
    """Return a question that singles ``shown`` out by its digit, its place or its colour."""
    asks: list[tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = [
        (("digit",), _ABOUT_DIGIT),
        (("row", "column"), _ABOUT_PLACE),
    ]
    if [other.colour for other in scene].count(shown.colour) == 1:
        asks.append((("colour",), _ABOUT_COLOUR))
    named, phrases = rng.choice(asks)
    question, sentence = rng.choice(phrases)
    given = {name: getattr(shown, name) for name in named}
    return question.format(**given), fill(sentence, given, shown._asdict())


def _count(phrase: tuple[str, str], scene: list[Shown]) -> QuestionAnswer:
    question, sentence = phrase
    num_large = sum(shown.size == "large" for shown in scene)
    seen = {"count": COUNT_WORDS[len(scene)], "large": COUNT_WORDS[num_large]}
    return question, fill(sentence, {}, seen)
