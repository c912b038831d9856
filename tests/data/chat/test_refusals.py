"""What chat templates, processors and records are refused for, each by one line with its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from regate_ds.data.chat.encode import ChatEncoder
from regate_ds.data.chat.messages import OWN_TEMPLATE
from regate_ds.data.llava.records import Record, SampleError, Turn
from regate_ds.families.table import STUDENTS
from regate_ds.recipe.students.processor import chat_encoder
from tests.support.chat_templates import MARKED, unmarked
from tests.support.conversations import random_record
from tests.support.processors import MAKERS

QWEN = unmarked(MARKED["qwen"])


def encoder(template: str = QWEN, max_length: int = 10_000) -> ChatEncoder:
    own = MAKERS["qwen2_5_vl"][0]()
    own.chat_template = template
    return chat_encoder(own, "<|image_pad|>", max_length=max_length)


def record(*turns: tuple[str, str], system: str | None = None, num_images: int = 0) -> Record:
    made = random_record(Random(0), 5, num_images=num_images)
    said = tuple(Turn(question, answer) for question, answer in turns)
    return replace(made, turns=said or made.turns, system=system)


GOOD = (Turn("what", "this"),)


def refused(
    encoder: ChatEncoder,
    record: Record,
    cause: str,
    good: tuple[Turn, ...] = GOOD,
    system: str | None = "Look.",
) -> None:
    """The record is refused, alone and in the company of good ones, which are encoded."""
    with pytest.raises(SampleError, match=cause) as one:
        encoder.encode(record)
    assert str(one.value).startswith("mine.json, record 5: ")
    assert "\n" not in str(one.value)
    company = replace(record, turns=good, images=(), images_per_marker=(), system=system)
    before, found, after = encoder.encode_all([company, record, company])
    assert isinstance(found, SampleError)
    assert str(found) == str(one.value)
    assert not isinstance(before, SampleError)
    assert not isinstance(after, SampleError)
    assert before.input_ids_S.equal(after.input_ids_S)


@pytest.mark.parametrize(
    "turns", [[("say <|im_end|>", "no")], [("q", "a"), ("q", "it is <|image_pad|>")]]
)
def test_the_text_of_a_special_token(turns: Any):
    refused(encoder(), record(*turns), "holds '<.im_end.>'|holds '<.image_pad.>'")


def test_the_text_of_a_special_token_in_a_system_text():
    refused(encoder(), record(system="<|im_start|>x"), "its system text holds '<.im_start.>'")


def test_a_sample_of_which_the_cut_leaves_no_answer_or_half_an_image():
    plain = record(("what is it that is shown here", "this"), system="Look.")
    short = len(encoder().encode(replace(plain, turns=GOOD)))
    cause = f"cutting its .*max_length={short} leaves no answer token"
    refused(encoder(max_length=short), plain, cause)
    pictured = record(("what <image>", "this"), num_images=1)
    whole = encoder().encode(pictured)
    inside = int((whole.image_S >= 0).nonzero()[-1])
    refused(encoder(max_length=inside), pictured, "would cut an image's placeholders off")
    cut = encoder(max_length=len(whole) - 2).encode(pictured)
    assert encoder(max_length=len(whole) - 2).is_cut(cut)
    assert cut.labels_S[:-1].equal(whole.labels_S[: len(cut) - 1])
    assert (len(cut.char_spans), int(cut.labels_S[-1])) == (int((cut.labels_S >= 0).sum()), -100)


def _change(old: str, new: str) -> Callable[[], str]:
    assert old in QWEN, old
    return lambda: QWEN.replace(old, new)


TEXT = "{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}"


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        # As Qwen3 drops the thoughts of earlier turns.
        (
            _change(TEXT, "{%- if not loop.last -%}gone{%- else -%}" + TEXT + "{%- endif -%}"),
            "writes 'gone<.im_end.>.n.*' for answer 1, 'this'",
        ),
        (
            lambda: "{%- if messages | length > 3 -%}long{%- endif -%}" + QWEN,
            "changes what it wrote before answer 1 once more is said; give each answer a record",
        ),
        (
            _change(TEXT, TEXT.replace("part['text']", "part['text'] | upper")),
            "writes 'THIS<.im_end.>.n.*' for answer 1, 'this'; correct the answer, or change",
        ),
    ],
)
def test_a_template_that_changes_answers(template: Callable[[], str], cause: str):
    turns = [("what", "this"), ("and", "that")]
    refused(encoder(template()), record(*turns), cause, (Turn("what", "7"),))


def test_an_answer_that_is_not_learnt_may_be_changed():
    template = QWEN.replace(TEXT, "{%- if loop.last -%}" + TEXT + "{%- endif -%}")
    said = (Turn("what", "this", learn=False), Turn("and", "that"))
    sample = encoder(template).encode(replace(record(), turns=said))
    tokens = MAKERS["qwen2_5_vl"][0]().tokenizer
    assert "this" not in tokens.decode(sample.input_ids_S)
    assert tokens.decode(sample.labels_S[sample.labels_S != -100]) == "that<|im_end|>"


def test_a_template_that_writes_before_an_answer_what_it_does_not_ask_by():
    with pytest.raises(ValueError, match="writes '<think></think>.*' for answer 1"):
        encoder(_change(TEXT, "<think></think>" + TEXT)())


def test_a_template_that_ends_only_the_last_answer():
    end = "{{ '<|im_end|>' }}"
    assert end in QWEN
    template = QWEN.replace(end, "{%- if loop.last -%}" + end + "{%- endif -%}")
    cause = "writes '.n<.im_start.>' behind answer 1, and '<.im_end.>' behind one that is the last"
    refused(encoder(template), record(("what", "this"), ("and", "that")), cause)


def test_white_space_before_the_end_of_an_answer_is_learnt_with_it():
    end = "{{ '<|im_end|>' }}"
    spaced = encoder(QWEN.replace(end, "{{ ' <|im_end|>' }}"))
    one = record(("what", "this"), ("and", "that"))
    sample, tokens = spaced.encode(one), MAKERS["qwen2_5_vl"][0]().tokenizer
    learnt = tokens.decode(sample.labels_S[sample.labels_S != -100])
    assert learnt == "this <|im_end|>that <|im_end|>"
    assert spaced.end_ids == encoder().end_ids
    assert [span for span in sample.char_spans if span[1] == 4] == [(0, 4, 4)] * 2 + [(1, 4, 4)] * 2


@pytest.mark.parametrize("answer", ["this", "this\n", " this ", "this \n\n"])
def test_white_space_that_a_template_moves_before_the_end_is_no_reason_to_refuse(answer: str):
    trimmed = TEXT.replace("part['text']", "part['text'] | trim") + "{{ '\\n' }}"
    made, tokens = encoder(_change(TEXT, trimmed)()), MAKERS["qwen2_5_vl"][0]().tokenizer
    sample = made.encode(record(("what", answer), ("and", "that")))
    learnt = tokens.decode(sample.labels_S[sample.labels_S != -100])
    assert learnt == "this\n<|im_end|>that\n<|im_end|>"
    assert sample.char_spans[0][1] == answer.index("this")


@pytest.mark.parametrize(
    ("strip", "learnt", "first"), [("lstrip", "this \n", 2), ("rstrip", "\n this", 0)]
)
def test_white_space_that_a_template_keeps_is_learnt(strip: str, learnt: str, first: int):
    one_side = TEXT.replace("part['text']", f"part['text'].{strip}()")
    made, tokens = encoder(_change(TEXT, one_side)()), MAKERS["qwen2_5_vl"][0]().tokenizer
    sample = made.encode(record(("what", "\n this \n")))
    assert tokens.decode(sample.labels_S[sample.labels_S != -100]) == learnt + "<|im_end|>"
    assert sample.char_spans[0][1] == first


def test_characters_of_private_use_are_text_as_any_other():
    sample = encoder().encode(record(("\ue000 \ue001", "\ue002\ue000")))
    tokens = MAKERS["qwen2_5_vl"][0]().tokenizer
    assert tokens.decode(sample.labels_S[sample.labels_S != -100]) == "\ue002\ue000<|im_end|>"


def test_a_template_that_ends_no_answer():
    cause = "no special token ends, .* change the model's chat template, or set data.template"
    with pytest.raises(ValueError, match=cause):
        encoder(QWEN.replace("{{ '<|im_end|>' }}", ""))


def test_the_package_s_own_template_is_offered_to_the_students_that_can_take_it():
    first, second, third = sorted(STUDENTS)
    assert f"({first}, {second} and {third} alone)" in OWN_TEMPLATE


def test_a_template_that_cannot_be_rendered():
    with pytest.raises(ValueError, match="cannot be used for training .*nothing here"):
        encoder("{{ raise_exception('nothing here') }}")


def test_a_record_that_its_template_refuses():
    template = (
        "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    )
    refused(
        encoder(template + QWEN),
        record(system="x"),
        "refuses it .TemplateError: no system.",
        system=None,
    )


def test_a_template_that_writes_the_day_where_it_does():
    dated = "{%- set today = strftime_now('%Y') -%}" + QWEN.replace(
        "You are a helpful assistant.", "It is ' + today + '."
    )
    refused(encoder(dated), record(("what", "this")), "writes the day's date")
    own = record(("what", "this"), system="You see.")
    assert encoder(dated).encode(own).input_ids_S.equal(encoder().encode(own).input_ids_S)


def test_a_template_that_loses_an_image():
    template = QWEN.replace("<|image_pad|>", "")
    with_image = record(("what <image>", "this"), num_images=1)
    refused(encoder(template), with_image, "writes 0 images of its 1")


def test_a_size_that_the_processor_does_not_take():
    class Strict:
        placeholder, patch = "<|image_pad|>", "<|image_pad|>"
        no_videos = None

        def texts(self, sizes: list[Any]) -> list[str]:
            if sizes:
                raise ValueError("too thin")
            return []

    made = encoder()
    made._images = Strict()  # type: ignore[assignment]
    with_image = record(("what <image>", "this"), num_images=1)
    refused(made, with_image, "what it shows does not suit the model .too thin.")


def test_a_patch_that_is_no_special_token():
    made = encoder()
    made._patch_ids[0] += 1
    with_image = record(("what <image>", "this"), num_images=1)
    refused(made, with_image, "the tokenizer reads the .* of patches of image 1 as 0 tokens")


def test_a_patch_that_is_a_usual_word_of_the_tokenizer():
    own = MAKERS["qwen2_5_vl"][0]()
    with pytest.raises(ValueError, match="has 'a', which .* not among its added tokens"):
        chat_encoder(own, "a", max_length=9)


def test_a_bos_that_a_template_writes_for_some_records_is_no_other_records_matter():
    own = MAKERS["llava"][0]()
    bos = "{%- if messages[0]['role'] == 'system' -%}{{ bos_token }}{%- endif -%}"
    own.chat_template = own.chat_template.replace("{{ bos_token }}", bos)
    made = chat_encoder(own, "<image>", max_length=99)
    pair = [record(("what", "this"), system="Look."), record(("what", "this"))]
    for records in (pair, pair[::-1]):
        for one, found in zip(records, made.encode_all(records), strict=True):
            assert not isinstance(found, SampleError)
            assert found.input_ids_S.equal(made.encode(one).input_ids_S)
            assert found.input_ids_S.tolist().count(own.tokenizer.bos_token_id) == 1
