from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.records import Record, Turn
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.data.llava.template import Template
from regate_ds.job.process import Process
from regate_ds.recipe.evaluation.words import (
    HeldOut,
    evaluate,
    share_of_process,
    tally_words,
    words_of,
)
from tests.support.tiny_students import make_image, make_llava, make_qwen2_vl

ALONE = Process(0, 1, torch.device("cpu"))


def make_records(folder: Path, *, images=(1, 1, 0, 2, 1)) -> list[Record]:
    """Questions with one or two turns; the digit and the colour need the image."""
    records = []
    for number, num_images in enumerate(images):
        paths = tuple(folder / f"{number}-{i}.png" for i in range(num_images))
        for i, path in enumerate(paths):
            make_image(seed=10 * number + i).save(path)
        answer = "a red 3 is at the top" if number % 2 else "the digit is 7"
        gold = ((2, 5), (6, 7)) if number % 2 else ((13, 14),)
        turns = [Turn("<image> " * num_images + "what is shown ?", answer, gold)]
        turns += [Turn("what digit ?", "a blue 3", ((2, 6), (7, 8)))] * (number % 3 == 1)
        counts = (1,) * num_images
        records.append(Record(("test", number), None, paths, counts, tuple(turns), folder))
    return records


def make_held_out(student, records, **settings) -> HeldOut:
    encoder = Encoder(
        student.tokenizer,
        image_token=student.image_token,
        num_image_tokens=student.vision.num_tokens,
        max_length=128,
        # Qwen2-VL tells images that follow each other apart by the text between them.
        template=Template(user="USER ", assistant=" ASSISTANT ", image_start=" : "),
    )
    return HeldOut(
        records=records,
        encoder=encoder,
        tokenizer=student.tokenizer,
        vision=student.vision,
        **settings,
    )


def plain_evaluation(student, held_out):
    """One sample, one position, one word at a time, on full logits."""
    right, count = {True: 0, False: 0}, {True: 0, False: 0}
    losses = []
    for record in held_out.records:
        sample = held_out.encoder.encode(record)
        ids_BT = sample.input_ids_S[None]
        inputs = {"input_ids": ids_BT}
        if record.images:
            inputs |= student.vision.extra_inputs(ids_BT, sample.is_placeholder_S[None])
            inputs |= student.vision.pixels([make_from(path) for path in record.images])
        with torch.no_grad():
            logits_TV = student.model.eval()(**inputs).logits[0].double()
        positions = [t for t, label in enumerate(sample.labels_S.tolist()) if label >= 0]
        losses += [-logits_TV[t].log_softmax(-1)[sample.labels_S[t]].item() for t in positions]
        # The tiny tokenizer has one token for each word, and an eos after each answer.
        hits = iter([bool(logits_TV[t].argmax() == sample.labels_S[t]) for t in positions])
        for turn in record.turns:
            start = 0
            for word in turn.answer.split(" "):
                visual = any(a <= start < b for a, b in turn.gold_spans)
                right[visual] += next(hits)
                count[visual] += 1
                start += len(word) + 1
            next(hits)
    return {
        "accuracy_visual": right[True] / count[True],
        "accuracy_plain": right[False] / count[False],
        "loss": sum(losses) / len(losses),
        "num_words_visual": count[True],
        "num_words_plain": count[False],
    }


def make_from(path):
    from PIL import Image

    return Image.open(path).convert("RGB")


def teach(student, held_out):
    """A few steps on the held-out set, so that some words are right and some are wrong."""
    student.model.train()
    optimizer = torch.optim.SGD(student.model.parameters(), lr=0.3)
    for record in held_out.records * 2:
        sample = held_out.encoder.encode(record)
        logits_TV = student.model.lm_head(
            student.model.model.language_model(input_ids=sample.input_ids_S[None])[0]
        )[0]
        torch.nn.functional.cross_entropy(logits_TV, sample.labels_S).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [make_llava, make_qwen2_vl])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_agrees_with_one_word_at_a_time_on_full_logits(make, batch_size, tmp_path):
    student = make()
    held_out = make_held_out(student, make_records(tmp_path), batch_size=batch_size)
    teach(student, held_out)
    wanted = plain_evaluation(student, held_out)
    got = evaluate(student.model, held_out, ALONE)
    assert 0 < wanted["accuracy_plain"] < 1
    assert got.pop("loss") == pytest.approx(wanted.pop("loss"), abs=1e-5)
    assert got == wanted


def test_the_head_runs_on_label_columns_only(tmp_path):
    student = make_llava()
    held_out = make_held_out(student, make_records(tmp_path))
    shapes = []
    student.model.lm_head.register_forward_hook(lambda *call: shapes.append(call[2].shape[1]))
    evaluate(student.model, held_out, ALONE)
    longest = max(len(held_out.encoder.encode(record)) for record in held_out.records)
    assert shapes
    assert max(shapes) < longest / 2


def test_evaluation_leaves_mode_gradients_and_random_state_as_they_were(tmp_path):
    student = make_llava()
    held_out = make_held_out(student, make_records(tmp_path))
    student.model.train()
    student.model.model.vision_tower.eval()
    before = torch.get_rng_state()
    evaluate(student.model, held_out, ALONE)
    assert student.model.training
    assert not any(m.training for m in student.model.model.vision_tower.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in student.model.parameters())


def test_a_word_is_right_only_if_all_its_tokens_are():
    turn = Turn("?", "a red  seven.", gold_spans=((7, 12),))
    spans = ((0, 0, 1), (0, 1, 5), (0, 7, 9), (0, 9, 13), (0, 13, 13))
    sample = SimpleNamespace(char_spans=spans)
    tally = tally_words([turn], sample, [True, False, True, False, True])
    assert (tally.right_plain, tally.num_plain) == (1, 2)
    assert (tally.right_visual, tally.num_visual) == (0, 1)
    assert tally_words([turn], sample, [True] * 5).right_visual == 1


def test_a_word_that_was_cut_off_is_not_counted():
    turn = Turn("?", "a red seven")
    sample = SimpleNamespace(char_spans=((0, 0, 1), (0, 1, 5), (0, 5, 8)))
    assert tally_words([turn], sample, [True] * 3).num_plain == 2


def test_a_word_that_may_have_been_cut_within_a_character_is_not_counted():
    turn = Turn("?", "a \u732b", gold_spans=((2, 3),))
    # Three bytes, of which the third is beyond the cut.
    sample = SimpleNamespace(char_spans=((0, 0, 1), (0, 1, 3), (0, 2, 3)))
    assert tally_words([turn], sample, [True] * 3).num_visual == 0


def test_a_word_without_tokens_is_not_counted():
    turn = Turn("?", "a \u200b red")
    sample = SimpleNamespace(char_spans=((0, 0, 1), (0, 4, 7), (0, 7, 7)))
    tally = tally_words([turn], sample, [True] * 3)
    assert (tally.right_plain, tally.num_plain) == (2, 2)


def test_an_accuracy_of_nothing_is_none(tmp_path):
    student = make_llava()
    [record] = make_records(tmp_path, images=(1,))
    plain = replace(record, turns=(replace(record.turns[0], gold_spans=()),))
    scores = evaluate(student.model, make_held_out(student, [plain]), ALONE)
    assert (scores["accuracy_visual"], scores["num_words_visual"]) == (None, 0)
    assert scores["accuracy_plain"] is not None


def test_words_are_visual_if_they_overlap_a_gold_span():
    words = words_of(Turn("?", "two reds, one\nblue", gold_spans=((0, 3), (5, 7), (14, 18))))
    assert [w.is_visual for w in words] == [True, True, False, True]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_samples_and_run_the_same_modules(world_size, tmp_path):
    records = make_records(tmp_path, images=(1, 0, 1, 1, 1, 0, 1))
    has_images = [bool(record.images) for record in records]
    shares = [
        share_of_process(has_images, Process(rank, world_size, torch.device("cpu")), 2)
        for rank in range(world_size)
    ]
    counted = [i for share in shares for numbers, counts in share for i in numbers if counts]
    assert sorted(counted) == list(range(7))
    for batches in zip(*shares, strict=True):
        assert len({bool(records[i].images) for numbers, _ in batches for i in numbers}) == 1


def test_a_repeated_sample_does_not_count(tmp_path):
    student = make_llava()
    records = make_records(tmp_path)
    held_out = make_held_out(student, records, batch_size=1)
    words = evaluate(student.model, held_out, Process(0, 1, torch.device("cpu")))
    # Ranks without a group: each tells its own share only.
    shares = [
        evaluate(student.model, held_out, SimpleNamespace(**vars(ALONE) | part, group=None))
        for part in ({"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 2})
    ]
    for name in ("num_words_visual", "num_words_plain"):
        assert sum(share[name] for share in shares) == words[name]


def test_encoded_samples_and_words_agree_on_turns(tmp_path):
    student = make_llava()
    record = make_records(tmp_path)[1]
    sample = make_held_out(student, [record]).encoder.encode(record)
    assert isinstance(sample, EncodedSample)
    tally = tally_words(record.turns, sample, [True] * len(sample.char_spans))
    assert (tally.num_visual, tally.num_plain) == (4, 6)
