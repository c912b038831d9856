"""Find the image tokens and the answer tokens of a text by the characters of its tokens.

Shapes: S positions of one sample, N label positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.chat.render import AnswerPlace
from regate_ds.data.chat.write import Written
from regate_ds.data.llava.records import Turn
from regate_ds.data.llava.sample import CharSpan


def number_patches(
    written: Written, ids_S: np.ndarray, places_S2: np.ndarray, patch_id: int
) -> np.ndarray:
    """Return int64 [S]: the image of each patch, -1 elsewhere: at separators too.

    ValueError if the tokenizer does not read each patch as one token.
    """
    image_S = np.full(len(ids_S), -1, dtype=np.int64)
    for number, ((start, end), wanted) in enumerate(zip(written.images, written.patches)):
        is_in_S = (places_S2[:, 0] >= start) & (places_S2[:, 1] <= end)
        is_in_S &= (ids_S == patch_id) & (places_S2[:, 1] > places_S2[:, 0])
        image_S[is_in_S] = number
        if int(is_in_S.sum()) != wanted:
            raise ValueError(
                f"the tokenizer reads the {wanted} patches of image {number + 1} as "
                f"{int(is_in_S.sum())} tokens of id {patch_id}; make the image token a special one"
            )
    return image_S


def label(
    written: Written,
    turns: Sequence[Turn],
    ids_S: np.ndarray,
    places_S2: np.ndarray,
    *,
    with_spans: bool,
) -> tuple[np.ndarray, list[CharSpan]]:
    """Return the labels [S] of the answers that are learnt, and their tokens' places in them.

    A token belongs to an answer if it has any character of it, or ends it. Samples may be longer
    than [S]: the places of the first S tokens say which of them are labelled.
    """
    labels_S = np.full(len(ids_S), IGNORE, dtype=np.int64)
    spans: list[CharSpan] = []
    for number, (answer, turn) in enumerate(zip(written.answers, turns)):
        if not turn.learn:
            continue
        is_in_S = (places_S2[:, 0] < answer.closed) & (places_S2[:, 1] > answer.start)
        at_N = is_in_S.nonzero()[0]
        # No position predicts the first token of a sample.
        at_N = at_N[at_N > 0]
        labels_S[at_N - 1] = ids_S[at_N]
        spans += _spans(number, answer, places_S2[at_N]) if with_spans else ()
    return labels_S, spans


def _spans(turn: int, answer: AnswerPlace, places_N2: np.ndarray) -> list[CharSpan]:
    """Return each token's place in the characters of its answer; the last one is its end."""
    places = (places_N2 - answer.start).clip(0, answer.end - answer.start) + answer.lead
    spans: list[CharSpan] = [(turn, start, end) for start, end in places.tolist()]
    is_end = places_N2[:, 0] >= answer.end
    return [
        (turn, answer.length, answer.length) if ends else span
        for span, ends in zip(spans, is_end.tolist())
    ]
