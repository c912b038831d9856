"""Draw one training sample with its scores and its plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.rows import RowLayout
from regate_ds.data.collate import Collator, LoadedSample
from regate_ds.data.interfaces import VisionInputs
from regate_ds.data.llava.clips import Clip, load_visuals
from regate_ds.data.llava.records import Record
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.estimate.unseen import plan_unseen, read_orders_of
from regate_ds.recipe.reports.plots import TokenMark, plot_sample
from regate_ds.stores.reference.reader import ReferenceStore


def picture_sample(config: RunConfig, path: Path) -> None:
    """Plan the first sample with a single turn as its first sparse step would, and draw it.

    Its difficulty is 0 there.
    """
    if config.elision.chooses_after_forward:
        raise ValueError(
            "elision.execution=after_forward chooses after the forward pass, so that there is "
            "nothing to draw before it; draw loss_only"
        )
    assert config.teacher.store is not None
    corpus = load_corpus(config)
    number = next((i for i, r in enumerate(corpus.train_records) if len(r.turns) == 1), 0)
    record, encoded = corpus.train_records[number], corpus.train.encode(number)
    batch = Collator(pad_id=0, vision=None)([LoadedSample(encoded, ())]).tokens
    store = ReferenceStore(config.teacher.store)
    store.require_column(config.elision.column)
    score_N, (plan,) = plan_unseen(
        config.elision,
        [batch],
        store.read([encoded.key]),
        RowLayout(),
        read_orders_of(config),
    )
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
    (image,) = load_visuals(encoded.images[:1])
    question, kept_patches = record.turns[0].question, None
    if isinstance(image, Clip):
        image = image.frames[0]
    elif len(record.images) == 1:
        kept_patches = _kept_patches(batch, plan, corpus.student.vision.grid(image.size))
    plot_sample(_as_seen(corpus.student.vision, image), question, tokens, path, kept_patches)


def _as_seen(vision: VisionInputs, image: Image.Image) -> np.ndarray:
    """Return the picture as the tower gets it where its inputs are a picture, else as it is."""
    values = vision.pixels([image])["pixel_values"]
    if values.dim() != 4:
        return np.asarray(image)
    seen = values[0].float().permute(1, 2, 0).numpy()
    return (seen - seen.min()) / max(float(seen.max() - seen.min()), 1e-6)


def _kept_patches(batch: TokenBatch, plan: ElisionPlan, grid: tuple[int, int]) -> np.ndarray:
    """Return bool [rows, columns]: which tokens of the sample's image are kept.

    Those that predict an answer, and the sample's first position, count as they are planned.
    """
    assert batch.image_BT is not None
    is_kept_BT = np.zeros(batch.labels_BT.numel(), dtype=bool)
    is_kept_BT[plan.position_R.numpy()] = True
    return is_kept_BT[(batch.image_BT == 0).flatten().numpy()].reshape(grid)


def _text(record: Record, turn: int, start: int, end: int) -> str:
    return record.turns[turn].answer[start:end]


def _is_gold(record: Record, turn: int, start: int, end: int) -> bool:
    return any(a < end and start < b for a, b in record.turns[turn].gold_spans)
