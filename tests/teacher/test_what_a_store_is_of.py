"""A store belongs to data, tokenizer, template and teacher: a change of any of them is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.records import Record, Turn
from regate_ds.data.llava.template import Template
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.teacher.identity import teacher_id
from regate_ds.teacher.precompute import TeacherJob, precompute
from tests.support.models import causal_lm
from tests.teacher.plain_job_helper import score

TEXTS = ("Which colour is it?", "It is red.", "How many?", "There are three.")


def job(store: Path, change: str = "nothing") -> TeacherJob:
    vocabulary, answer = 300, "It is red."
    template, teacher = Template(), causal_lm()
    if change == "tokenizer":
        vocabulary = 280
    if change == "template":
        template = Template(assistant=" A: ")
    if change == "data":
        answer = "It is blue."
    if change == "teacher":
        with torch.no_grad():
            teacher.lm_head.weight[0, 0] += 1
    tokenizer = train_tokenizer([*TEXTS, "USER: ASSISTANT: A:"], vocab_size=vocabulary)
    encoder = Encoder(
        tokenizer,
        image_token="<image>",
        num_image_tokens=lambda _: 4,
        max_length=64,
        template=template,
    )
    turns = [
        (Turn(question=TEXTS[0], answer=answer, gold_spans=()),),
        (Turn(question=TEXTS[2], answer=TEXTS[3], gold_spans=()),),
    ]
    samples = [encoder.encode(record(number, turn)) for number, turn in enumerate(turns)]
    return TeacherJob(
        index=AnswerIndex.build(samples),
        encode=samples.__getitem__,
        score=score,
        teacher_id=teacher_id(teacher, pad_id=1),
        store=store,
        tokens_per_batch=64,
    )


def record(number: int, turns: tuple[Turn, ...]) -> Record:
    return Record(
        key=("set", number),
        id=None,
        source=Path("set.json"),
        turns=turns,
        images=(),
        images_per_marker=(),
    )


@pytest.mark.parametrize("change", ["data", "tokenizer", "template", "teacher"])
def test_a_change_is_refused_naming_both(tmp_path, change):
    own, other = job(tmp_path), job(tmp_path, change)
    precompute(own)
    names = own.index.fingerprint, other.index.fingerprint
    if change == "teacher":
        assert names[0] == names[1]
        names = own.teacher_id, other.teacher_id
    with pytest.raises(ValueError, match=f"belongs to .* {names[0]}, this job has {names[1]}"):
        precompute(other)
    assert precompute(job(tmp_path)).num_tokens == 0
