import itertools
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regate_ds.data.collate import SampleDataset
from regate_ds.data.llava.records import Turn
from regate_ds.recipe.evaluation.generation import (
    _answers,
    _in_common,
    _left_padded,
    evaluate_generated,
    match_gold_words,
    prompt_length,
)
from tests.recipe.evaluation.test_words import ALONE, make_held_out, make_records
from tests.support.tiny_students import make_image, make_llava, make_qwen2_vl


def test_a_gold_word_counts_only_in_its_place():
    turn = Turn("?", "a red 3 and a blue 7", gold_spans=((2, 5), (6, 7), (14, 18), (19, 20)))
    spans = tuple((0, m.start(), m.end()) for m in re.finditer(r"\S+", turn.answer))
    end = len(turn.answer)
    whole: Any = SimpleNamespace(char_spans=(*spans, (0, end, end)))
    assert match_gold_words([turn], whole, "a red 3 and a blue 7") == (4, 4)
    assert match_gold_words([turn], whole, "a blue 7 and a red 3") == (2, 4)
    assert match_gold_words([turn], whole, "a red 3 and") == (2, 4)
    assert match_gold_words([turn], whole, "") == (0, 4)


def test_of_a_sample_that_is_cut_the_last_turn_that_is_left_is_scored_up_to_the_cut():
    turn = Turn("?", "a red 3 and a blue 7", gold_spans=((2, 5), (6, 7), (14, 18), (19, 20)))
    cut: Any = SimpleNamespace(char_spans=((0, 0, 1), (0, 2, 5), (0, 6, 7), (0, 8, 11)))
    assert match_gold_words([turn, Turn("?", "no")], cut, "a red 7") == (1, 2)


def test_the_last_answer_that_is_learnt_is_scored_after_those_before_it(tmp_path):
    held_out = make_held_out(make_llava(), make_records(tmp_path, images=(0,)))
    turn = Turn("what is shown ?", "a red 3", gold_spans=((2, 5), (6, 7)))
    kept = replace(turn, answer="a blue 3", learn=False)
    record = replace(held_out.records[0], turns=(kept, turn, kept))
    sample = held_out.encoder.encode(record)
    shorter = held_out.encoder.encode(replace(record, turns=(replace(kept, learn=True), turn)))
    assert prompt_length(sample) == prompt_length(shorter)
    assert match_gold_words(record.turns, sample, "a red 3") == (2, 2)


def test_images_after_the_prompt_are_not_handed_on(tmp_path):
    student = make_llava()
    held_out = make_held_out(student, make_records(tmp_path, images=(1,)))
    [record] = held_out.records
    make_image().save(tmp_path / "later.png")
    later = Turn("<image> what ?", "a 3 at the top")
    record = replace(
        record,
        images=(*record.images, tmp_path / "later.png"),
        images_per_marker=(1, 1),
        turns=(*record.turns, later),
    )
    whole = held_out.encoder.encode(record)
    held_out.encoder._max_length = prompt_length(whole)
    [sample] = [SampleDataset([record], held_out.encoder)[0]]
    assert (len(sample.images), sample.encoded.char_spans[-1][0]) == (2, 0)
    prompt = held_out.encoder.prompt(record, sample.encoded, 0)
    inputs = _left_padded(held_out, [sample], [prompt])
    assert len(inputs["pixel_values"]) == 1


def test_marked_words_form_a_longest_common_subsequence():
    """The oracle tries every subset of the wanted words."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        wanted, given = (
            "".join("abc"[i] for i in torch.randint(3, (6,), generator=generator)) for _ in range(2)
        )
        found = _in_common(wanted, given)
        marked = [w for w, is_found in zip(wanted, found) if is_found]
        rest = iter(given)
        assert all(word in rest for word in marked)
        best = max(
            size
            for size in range(7)
            for subset in itertools.combinations(wanted, size)
            if all(word in rest for rest in [iter(given)] for word in subset)
        )
        assert len(marked) == best


@pytest.mark.parametrize("make", [make_llava, make_qwen2_vl])
def test_answers_do_not_depend_on_the_other_rows_of_the_batch(make, tmp_path):
    student = make()
    held_out = make_held_out(student, make_records(tmp_path))
    dataset = SampleDataset(held_out.records, held_out.encoder)
    numbers = (0, 1, 3, 4)
    samples = [dataset[i] for i in numbers]
    records = [held_out.records[i] for i in numbers]
    student.model.eval()
    together = _answers(student.model, held_out, records, samples, ALONE)
    apart = [
        _answers(student.model, held_out, [record], [sample], ALONE)[0]
        for record, sample in zip(records, samples)
    ]
    # A batch gives every row the spare tokens of its longest answer.
    assert all(t.startswith(a) for t, a in zip(together, apart))
    assert len(set(apart)) > 1


def test_a_prompt_ends_just_before_the_last_answer(tmp_path):
    student = make_llava()
    held_out = make_held_out(student, make_records(tmp_path))
    sample = held_out.encoder.encode(held_out.records[1])
    rest = student.tokenizer.decode(sample.input_ids_S[prompt_length(sample) :])
    assert rest.split() == ["a", "blue", "3", "</s>"]


def test_generated_accuracy_counts_the_gold_words_of_last_turns(tmp_path):
    student = make_llava()
    held_out = make_held_out(student, make_records(tmp_path), batch_size=2)
    result = evaluate_generated(student.model, held_out, ALONE, num_samples=4)
    assert result["num_words_generated"] == 1 + 2 + 1 + 2
    assert 0.0 <= result["accuracy_generated"] <= 1.0


def test_a_perfect_model_gets_all_gold_words(tmp_path):
    student = make_llava()
    held_out = make_held_out(student, make_records(tmp_path), batch_size=2)

    class Perfect(torch.nn.Module):
        """Answers each row with the true answer, found by the length of its prompt."""

        def generate(self, input_ids, **_):
            samples = [held_out.encoder.encode(record) for record in held_out.records]
            answers = []
            for ids in input_ids:
                prompt = ids[ids != held_out.pad_id]
                fits = [s for s in samples if s.input_ids_S[: len(prompt)].equal(prompt)]
                answers.append(fits[0].input_ids_S[len(prompt) :])
            rest = torch.nn.utils.rnn.pad_sequence(answers, True, held_out.pad_id)
            return torch.cat([input_ids, rest], dim=1)

    result = evaluate_generated(Perfect(), held_out, ALONE, num_samples=2)
    assert result == {"accuracy_generated": 1.0, "num_words_generated": 3}
