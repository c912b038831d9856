"""The questions and answers about a picture of shapes, and which words need the image.

A question fixes how its answer is phrased, so that a reader without the image can predict every
word but the gold ones. No gold word follows from the question, from an earlier answer, or from the
order of the answer. Most questions are on how shapes stand to each other, or on how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

from regate_ds.recipe.tasks.answers import QuestionAnswer, fill
from regate_ds.recipe.tasks.shapes.words import (
    COMPARED,
    COUNT_WORDS,
    FILLS,
    ROWS,
    SHAPES,
    Scene,
    Shown,
    names,
    neighbours,
    plural,
)

_WHERE = (
    (
        "Where is the {name}?",
        "The {name} is in the {row} row and in the {column} column, and it is {fill}.",
    ),
    (
        "Describe the {name}.",
        "The {name} is {size} and {fill}. Its place is in the {row} row, {column} column.",
    ),
)

_AT = (
    (
        "What is in the {row} row and in the {column} column?",
        "In this place there is a {shape}. It is {fill}, and its colour is {colour}.",
    ),
    (
        "Describe the shape at the place {row} {column}.",
        "The shape at this place is {size} and {colour}. It is {fill}, and a {shape}.",
    ),
)

_BESIDE = (
    (
        "What is just {relation} the {name}?",
        "Just {relation} the {name} there is a {shape}. It is {fill}, and its colour is {colour}.",
    ),
    (
        "Describe the shape that is just {relation} the {name}.",
        "The shape just {relation} the {name} is {size} and {colour}. It is {fill}, and a {shape}.",
    ),
)

_LARGER = (
    "Which is larger, the {name} or the {other}?",
    "Of both shapes, the larger is the {shape}. It is {fill}, and it is in the {row} row.",
)

_COUNT = (
    "How many {shapes} are there, and how many shapes are {colour}?",
    "The number of {shapes} is {count}, and the number of {colour} shapes is {number}.",
)

_COUNT_FILL = (
    "How many shapes are {fill}, and how many are {size}?",
    "The number of {fill} shapes is {count}, and the number of {size} shapes is {number}.",
)

_COUNT_ALL = ("How many shapes are there?", "There are {count} shapes in this picture.")

_MORE = (
    "Are there more {shapes} than {others}?",
    "If we count both, the number of {shapes} is {compared} compared with that of {others}.",
)

_OFTEN = {
    "colour": (
        "Which colour is seen most often?",
        "The colour that most of the shapes have is {colour}, and {count} of them have it.",
    ),
    "shape": (
        "Which kind of shape is seen most often?",
        "The shape that is seen most often is the {shape}, and there are {count} of this kind.",
    ),
}

_ALONE = (
    "Which shape is alone in its row?",
    "The shape that is alone is in the {row} row. It is a {shape}, {fill} and {colour}.",
)

_READ = (
    "Read the {row} row from left to right.",
    "There are {count} shapes in the {row} row.",
    " The next is {fill} and {colour}, and it is a {shape}.",
)


def ask(scene: Scene, rng: Random) -> list[QuestionAnswer]:
    """Return one or several turns about one picture."""
    if rng.random() < 0.35:
        return _several(scene, rng)
    kinds, weights = zip(*_KINDS)
    while True:
        # Not every picture has an answer to every question, but all can be counted.
        found = rng.choices(kinds, weights)[0](scene, rng)
        if found is not None:
            return [found]


def _several(scene: Scene, rng: Random) -> list[QuestionAnswer]:
    """Ask about different shapes, so that no turn answers a later one."""
    count = {"count": COUNT_WORDS[len(scene)]}
    turns = [(_COUNT_ALL[0], fill(_COUNT_ALL[1], {}, count))] if rng.random() < 0.3 else []
    named, *others = rng.sample(scene, len(scene))
    turns.append(_about(scene, named, rng))
    for shown in others:
        relations = [r for r, beside in neighbours(scene, shown).items() if beside != named]
        if relations:
            return [*turns, _beside(scene, shown, rng.choice(relations), rng)]
    return [*turns, _about(scene, others[0], rng)]


def _one(scene: Scene, rng: Random) -> QuestionAnswer:
    return _about(scene, rng.choice(scene), rng)


def _about(scene: Scene, shown: Shown, rng: Random) -> QuestionAnswer:
    return _named(scene, shown, rng) if rng.random() < 0.5 else _placed(shown, rng)


def _placed(shown: Shown, rng: Random) -> QuestionAnswer:
    question, sentence = rng.choice(_AT)
    given = {"row": shown.row, "column": shown.column}
    return question.format(**given), fill(sentence, given, shown._asdict())


def _named(scene: Scene, shown: Shown, rng: Random) -> QuestionAnswer:
    question, sentence = rng.choice(_WHERE)
    given = {"name": rng.choice(names(scene, shown))}
    return question.format(**given), fill(sentence, given, shown._asdict())


def _next_to(scene: Scene, rng: Random) -> QuestionAnswer | None:
    pairs = [(shown, relation) for shown in scene for relation in neighbours(scene, shown)]
    return _beside(scene, *rng.choice(pairs), rng) if pairs else None


def _beside(scene: Scene, shown: Shown, relation: str, rng: Random) -> QuestionAnswer:
    question, sentence = rng.choice(_BESIDE)
    given = {"name": rng.choice(names(scene, shown)), "relation": relation}
    seen = neighbours(scene, shown)[relation]
    return question.format(**given), fill(sentence, given, seen._asdict())


def _larger(scene: Scene, rng: Random) -> QuestionAnswer | None:
    large = [shown for shown in scene if shown.size == "large"]
    pairs = [(a, b) for a in large for b in scene if b.size == "small" and b.shape != a.shape]
    if not pairs:
        return None
    pair = rng.choice(pairs)
    first, second = rng.sample(pair, 2)
    question, sentence = _LARGER
    return question.format(name=first.name, other=second.name), fill(
        sentence, {}, pair[0]._asdict()
    )


def _count(scene: Scene, rng: Random) -> QuestionAnswer:
    shape, colour = rng.choice(SHAPES), rng.choice(scene).colour
    if rng.random() < 0.8:
        shape = rng.choice(scene).shape
    given = {"shapes": plural(shape), "colour": colour}
    numbers = [_number(scene, "shape", shape), _number(scene, "colour", colour)]
    return _two_numbers(_COUNT, given, numbers)


def _count_fill(scene: Scene, rng: Random) -> QuestionAnswer:
    given = {"fill": rng.choice(FILLS), "size": rng.choice(("small", "large"))}
    return _two_numbers(_COUNT_FILL, given, [_number(scene, *item) for item in given.items()])


def _two_numbers(
    phrase: tuple[str, str], given: dict[str, str], numbers: list[int]
) -> QuestionAnswer:
    count, number = (COUNT_WORDS[each] for each in numbers)
    return phrase[0].format(**given), fill(phrase[1], given, {"count": count, "number": number})


def _number(scene: Scene, kind: str, word: str) -> int:
    return sum(getattr(shown, kind) == word for shown in scene)


def _more(scene: Scene, rng: Random) -> QuestionAnswer | None:
    kinds = sorted({shown.shape for shown in scene})
    if len(kinds) < 2:
        return None
    first, second = rng.sample(kinds, 2)
    given = {"shapes": plural(first), "others": plural(second)}
    more = _number(scene, "shape", first) - _number(scene, "shape", second)
    compared = COMPARED[(more > 0) - (more < 0) + 1]
    return _MORE[0].format(**given), fill(_MORE[1], given, {"compared": compared})


def _often(scene: Scene, rng: Random) -> QuestionAnswer | None:
    kind = rng.choice(list(_OFTEN))
    (word, number), *rest = Counter(getattr(shown, kind) for shown in scene).most_common()
    if rest and rest[0][1] == number:
        return None
    question, sentence = _OFTEN[kind]
    return question, fill(sentence, {}, {kind: word, "count": COUNT_WORDS[number]})


def _alone(scene: Scene, rng: Random) -> QuestionAnswer | None:
    alone = [shown for shown in scene if _number(scene, "row", shown.row) == 1]
    return (_ALONE[0], fill(_ALONE[1], {}, alone[0]._asdict())) if len(alone) == 1 else None


def _read(scene: Scene, rng: Random) -> QuestionAnswer | None:
    row = rng.choice(ROWS)
    read = [shown for shown in scene if shown.row == row]
    if not 2 <= len(read) <= 4:
        return None
    question, opening, sentence = _READ
    answer = fill(opening, {"row": row}, {"count": COUNT_WORDS[len(read)]})
    for shown in read:
        answer += fill(sentence, {}, shown._asdict())
    return question.format(row=row), answer


_KINDS: tuple[tuple[Callable[[Scene, Random], QuestionAnswer | None], float], ...] = (
    (_one, 0.28),
    (_next_to, 0.2),
    (_larger, 0.14),
    (_count, 0.14),
    (_count_fill, 0.12),
    (_more, 0.12),
    (_often, 0.16),
    (_alone, 0.2),
    (_read, 0.12),
)
"""Each kind of question, and how often it is drawn among those that a picture can answer."""
