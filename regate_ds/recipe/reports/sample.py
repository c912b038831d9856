"""Draw one training sample with its scores and its plan."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from regate_ds.algorithm.rows import RowLayout
from regate_ds.data.collate import Collator, LoadedSample
from regate_ds.data.llava.records import Record
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.estimate.plan_walk import plan_unseen
from regate_ds.recipe.reports.plots import TokenMark, plot_sample
from regate_ds.stores.reference.reader import ReferenceStore


def picture_sample(config: RunConfig, path: Path) -> None:
    """Plan the first sample with a single turn as its first sparse step would, and draw it.

    Its difficulty is 0 there.
    """
    assert config.teacher.store is not None
    corpus = load_corpus(config)
    number = next((i for i, r in enumerate(corpus.train_records) if len(r.turns) == 1), 0)
    record, encoded = corpus.train_records[number], corpus.train.encode(number)
    batch = Collator(pad_id=0, vision=None)([LoadedSample(encoded, ())]).tokens
    store = ReferenceStore(config.teacher.store)
    score_N, (plan,) = plan_unseen(config.elision, [batch], store.read([encoded.key]), RowLayout())
    kept = set(plan.label_position_L.tolist())
    positions = batch.is_label_BT[0].nonzero().squeeze(1).tolist()
    tokens = [
        TokenMark(
            text=_text(record, *span) or "<eos>",
            score=float(score),
            is_kept=position in kept,
            is_gold=_is_gold(record, *span),
        )
        for span, score, position in zip(encoded.char_spans, score_N, positions, strict=True)
    ]
    with Image.open(record.images[0]) as image:
        plot_sample(image.convert("RGB"), record.turns[0].question, tokens, path)


def _text(record: Record, turn: int, start: int, end: int) -> str:
    return record.turns[turn].answer[start:end]


def _is_gold(record: Record, turn: int, start: int, end: int) -> bool:
    return any(a < end and start < b for a, b in record.turns[turn].gold_spans)
