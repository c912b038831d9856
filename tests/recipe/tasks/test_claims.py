"""What the digits set promises: the reference finds the words that need the image."""

from __future__ import annotations

from pathlib import Path

from regate_ds.data.llava.read import read_records
from regate_ds.recipe.tasks.digits.scenes import build_digits
from regate_ds.recipe.tasks.pretraining.student import (
    PhaseConfig,
    PretrainConfig,
    encoder_of,
    learn_text,
)
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.scoring import score_samples
from tests.support.small_corpus import TEXT, VISION

TOP_SHARE = 0.9


def test_the_top_half_by_reference_holds_the_words_that_need_the_image(tmp_path: Path):
    build_digits(tmp_path, num_train=600, num_test=1, seed=0)
    records, _ = read_records(tmp_path / "train.json", name="digits")
    config = PretrainConfig(
        text={**TEXT, "hidden_size": 64, "intermediate_size": 128},
        vision=VISION,
        text_phase=PhaseConfig(steps=150, batch=16, lr=4e-3),
    )
    student = learn_text(records, config)
    encoder = encoder_of(student, 256)

    teacher = text_backbone(student.model)
    num_found = num_words = 0
    for record in records[:100]:
        sample = encoder.encode(record)
        losses = score_samples(teacher, [sample], pad_id=student.tokenizer.pad_token_id)
        best = set(losses.argsort(descending=True)[: -(-len(losses) // 2)].tolist())
        for number, turn in enumerate(record.turns):
            for start, end in turn.gold_spans:
                first = next(
                    i
                    for i, (t, a, b) in enumerate(sample.char_spans)
                    if t == number and a < end and start < b
                )
                num_words += 1
                num_found += first in best
    assert num_words > 300
    assert num_found >= TOP_SHARE * num_words, (num_found, num_words)
