"""Find the image tokens and the answer tokens of a text by the characters of its tokens.

Shapes: S positions of one sample, N label positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.chat.render import AnswerPlace
from regate_ds.data.chat.write import Written
from regate_ds.data.llava.records import Turn
from regate_ds.data.llava.sample import CharSpan


@dataclass(frozen=True)
class PlacedTokens:
    """The tokens of a text."""

    ids_S: np.ndarray
    places_S2: np.ndarray
    """int64: each one's place [start, end) in the characters of the text."""

    image_S: np.ndarray
    """int64: the image of each patch, -1 elsewhere: at separators too."""


def repeat_patches(
    written: Written, ids_S: np.ndarray, places_S2: np.ndarray, patch_ids: list[int]
) -> PlacedTokens:
    """Put all patches of a run in the place of the one that the tokenizer has read.

    ValueError if the tokenizer does not read each patch as one token.
    """
    image_S = np.full(len(ids_S), -1, dtype=np.int64)
    if not written.images:
        return PlacedTokens(ids_S, places_S2, image_S)
    times_S = np.ones(len(ids_S), dtype=np.int64)
    is_patch_S = np.isin(ids_S, patch_ids) & (places_S2[:, 1] > places_S2[:, 0])
    at_P = is_patch_S.nonzero()[0]
    starts_P, ends_P = places_S2[at_P].T
    for number, ((start, end), runs) in enumerate(zip(written.images, written.runs)):
        is_in_P = (starts_P >= start) & (ends_P <= end)
        if int(is_in_P.sum()) != len(runs):
            raise ValueError(
                f"the tokenizer reads the {len(runs)} runs of patches of image {number + 1} as "
                f"{int(is_in_P.sum())} tokens of id {patch_ids}; make the image token a special one"
            )
        image_S[at_P[is_in_P]] = number
        times_S[at_P[is_in_P]] = runs
    each_S = np.repeat(np.arange(len(ids_S)), times_S)
    return PlacedTokens(ids_S[each_S], places_S2[each_S], image_S[each_S])


def label(
    written: Written, turns: Sequence[Turn], tokens: PlacedTokens, length: int, *, with_spans: bool
) -> tuple[np.ndarray, list[CharSpan]]:
    """Return the labels of the answers that are learnt, and their tokens' places in them.

    A token belongs to an answer if it has any character of it, or ends it. Tokens beyond ``length``
    are cut off.
    """
    ids_S, places_S2 = tokens.ids_S[:length], tokens.places_S2[:length]
    labels_S = np.full(len(ids_S), IGNORE, dtype=np.int64)
    spans: list[CharSpan] = []
    for number, (answer, turn) in enumerate(zip(written.answers, turns)):
        if answer is None or not turn.learn:
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
