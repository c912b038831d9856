"""A teacher with a tokenizer of its own: exact where the two agree, nothing lost where not."""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.records import Record, Turn
from regate_ds.data.llava.template import Template
from regate_ds.teacher.scoring import score_samples
from regate_ds.teacher.tokenizers.other import OtherTokenizer, score_twice_written, tokenizer_id
from tests.support.models import causal_lm
from tests.teacher.two_tokenizers_helper import any_record, by_bytes, by_pieces, encoder_of


@pytest.fixture(scope="module")
def one():
    return by_bytes()


@pytest.fixture(scope="module")
def other():
    return by_pieces()


def random_losses(samples) -> torch.Tensor:
    """What a teacher might say, by the sample and the place alone."""
    losses = []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample.key[1])
        num_labels = int((sample.labels_S != IGNORE).sum())
        losses.append(torch.rand(10_000, generator=generator)[:num_labels])
    return torch.cat(losses)


def turn_sums(spans, losses) -> dict[int, float]:
    sums: dict[int, float] = {}
    for (turn, _, _), loss in zip(spans, losses.tolist(), strict=True):
        sums[turn] = sums.get(turn, 0.0) + loss
    return sums


def test_each_answers_total_is_the_teachers(one, other):
    rng, writer = random.Random(1), OtherTokenizer(encoder_of(one), other, pad_id=2)
    for number in range(200):
        written = writer.write(any_record(rng, number))
        mine = turn_sums(written.student.char_spans, score_twice_written(random_losses, [written]))
        theirs = turn_sums(written.teacher.char_spans, random_losses([written.teacher]))
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_a_cut_samples_labels_keep_the_losses_that_they_have_in_the_whole(one, other):
    rng, num_cut = random.Random(2), 0
    for number in range(200):
        record = any_record(rng, number)
        whole = OtherTokenizer(encoder_of(one), other, pad_id=2).write(record)
        first = int((whole.labels_S != IGNORE).nonzero()[0])
        length = rng.randint(first + 2, len(whole.student) + 1)
        cut = OtherTokenizer(encoder_of(one, length), other, pad_id=2).write(record)
        num_cut += len(cut.student) < len(whole.student)
        found = score_twice_written(random_losses, [cut])
        expected = score_twice_written(random_losses, [whole])
        assert len(found) == int((cut.labels_S != IGNORE).sum())
        assert torch.equal(found, expected[: len(found)])
        assert len(cut.teacher) <= len(whole.teacher)
    assert num_cut > 100


@pytest.mark.parametrize("max_length", [10_000, 50, 35])
@pytest.mark.parametrize("make", [by_bytes, by_pieces])
def test_a_tokenizer_that_agrees_gives_the_numbers_of_the_id_path(make, max_length):
    twin, rng = make(), random.Random(3)
    tokenizer = deepcopy(twin)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    encoder = encoder_of(tokenizer, max_length)
    writer = OtherTokenizer(encoder, twin, pad_id=twin.pad_token_id)
    teacher = causal_lm(vocab_size=len(tokenizer)).eval()

    def score(samples):
        return score_samples(teacher, samples, pad_id=twin.pad_token_id)

    records = [r for r in (any_record(rng, n) for n in range(80)) if fits(encoder, r)]
    samples = [encoder.encode(record) for record in records]
    found = score_twice_written(score, [writer.write(record) for record in records])
    assert len(records) > 10
    expected = score(samples)
    assert max_length < 10_000 or torch.equal(found, expected)
    # The prompt after a cut answer is read by the id path alone: sums over another width.
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


def fits(encoder: Encoder, record: Record) -> bool:
    try:
        encoder.encode(record)
    except ValueError:
        return False
    return True


def plain_losses(teacher, tokenizer, record: Record, template: Template) -> list[list[float]]:
    """Each turn's losses of its tokens and its eos, text after text, all logits in fp64."""
    ids, marks = [tokenizer.bos_token_id], [None]
    for number, turn in enumerate(record.turns):
        start = template.separator if number else template.system
        texts = f"{start}{template.user}{turn.question}{template.assistant}".split("<image>")
        for place, text in enumerate(texts):
            spelled = [tokenizer.pad_token_id] * 3 * (place > 0)
            spelled += tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            ids, marks = ids + spelled, marks + [None] * len(spelled)
        spelled = tokenizer(turn.answer, add_special_tokens=False)["input_ids"]
        spelled = [*spelled, tokenizer.eos_token_id]
        ids, marks = ids + spelled, marks + [number] * len(spelled)
    with torch.no_grad():
        logits_TV = teacher.double()(input_ids=torch.tensor([ids])).logits[0]
    losses: list[list[float]] = [[] for _ in record.turns]
    for t, turn in enumerate(marks):
        if turn is not None:
            losses[turn].append(float(F.cross_entropy(logits_TV[t - 1], torch.tensor(ids[t]))))
    return losses


def test_the_teacher_reads_the_template_and_its_pad_where_images_are(one, other, tmp_path: Path):
    image = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(image)
    turns = (Turn("<image>\nWhere is seven?", "The number is red."), Turn("And two?", "Top left."))
    record = Record(("set", 0), None, (image,), (1,), turns, Path("data.json"))
    written = OtherTokenizer(encoder_of(one), other, pad_id=other.pad_token_id).write(record)
    teacher = causal_lm(vocab_size=len(other)).eval()
    found = score_twice_written(
        lambda samples: score_samples(teacher, samples, pad_id=other.pad_token_id), [written]
    )
    expected = plain_losses(teacher, other, record, Template())
    sums = turn_sums(written.student.char_spans, found)
    assert sums == pytest.approx(dict(enumerate(map(sum, expected))), rel=1e-5)
    # The eos answers for the eos.
    assert float(found[-1]) == pytest.approx(expected[-1][-1], rel=1e-4)
    assert int(written.teacher.is_placeholder_S.sum()) == 3


def test_a_record_that_is_no_text_to_the_teacher_is_named(one, other):
    record = Record(("set", 4), "abc", (), (), (Turn("a [end] b", "c"),), Path("data.json"))
    writer = OtherTokenizer(encoder_of(one), other, pad_id=2)
    with pytest.raises(ValueError, match=r"record 4 .* '\[end\]', .* to the teacher's tokenizer"):
        writer.write(record)


def test_an_answer_that_nothing_comes_before_is_refused(one, other):
    encoder = Encoder(
        one,
        image_token="<image>",
        num_image_tokens=lambda size: 1,
        max_length=99,
        template=Template(user="", assistant=""),
    )
    other = by_pieces()
    other.bos_token = None
    record = Record(("set", 4), None, (), (), (Turn("", "red"),), Path("data.json"))
    with pytest.raises(ValueError, match=r"record 4: begins with its answer.*data\.template\.user"):
        OtherTokenizer(encoder, other, pad_id=2).write(record)


def test_a_tokenizers_name_follows_from_its_rules(one, other):
    assert tokenizer_id(one) == tokenizer_id(deepcopy(one))
    assert len({tokenizer_id(one), tokenizer_id(other)}) == 2
