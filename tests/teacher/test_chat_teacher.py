"""A teacher with its own tokenizer beside a student whose processor writes the samples."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.llava.records import Record
from regate_ds.recipe.students.processor import chat_encoder
from regate_ds.teacher.tokenizers.other import OtherTokenizer, score_twice_written
from tests.support.chat_templates import unmarked
from tests.support.conversations import random_record
from tests.support.processors import MAKERS, processor, tokenizer

MARKED = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}<turn>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] | trim + '<turn>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\\n' }}{% endif %}"
)


def make_teacher(template: str | None) -> Any:
    made = tokenizer(
        ["<pad>", "<end>", "<bos>", "<start>", "<turn>"],
        "spaces",
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
    )
    made.chat_template = template
    return made


def writer(student: str, template: str | None) -> tuple[OtherTokenizer, Any]:
    encoder = chat_encoder(processor(student), MAKERS[student][2], max_length=100_000)
    teacher = make_teacher(template)
    return OtherTokenizer(encoder, teacher, pad_id=teacher.pad_token_id), teacher


def records(num_images: int | None) -> list[Record]:
    random = Random(f"teacher {num_images}")
    return [random_record(random, n, num_images=num_images) for n in range(20)]


def texts_of(record: Record) -> list[dict[str, str]]:
    said = [] if record.system is None else [{"role": "system", "content": record.system}]
    for turn in record.turns:
        said.append({"role": "user", "content": turn.question})
        said.append({"role": "assistant", "content": turn.answer})
    return said


@pytest.mark.parametrize("marked", [MARKED, MARKED.removeprefix("{{ bos_token }}")])
def test_a_teacher_reads_a_conversation_by_its_own_chat_template(marked: str):
    written, teacher = writer("qwen2_5_vl", unmarked(marked))
    for record in records(0):
        own = teacher.apply_chat_template(
            texts_of(record),
            chat_template=marked,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        sample = written.write(record).teacher
        ids = own["input_ids"]
        assert sample.input_ids_S.tolist() == ids[: len(sample)]
        mask = own["assistant_masks"]
        runs = [t for t in range(1, len(mask)) if mask[t] and not mask[t - 1]]
        for number, (turn, start) in enumerate(zip(record.turns, runs, strict=True)):
            end = next(t for t in range(start, len(mask)) if not mask[t])
            wanted = ids[start:end] if turn.learn else [IGNORE] * (end - start)
            if number < len(record.turns) - 1 or turn.learn:
                assert sample.labels_S[start - 1 : end - 1].tolist() == wanted


@pytest.mark.parametrize("student", ["qwen2_5_vl", "llava_next", "idefics3"])
@pytest.mark.parametrize("template", [None, unmarked(MARKED)])
def test_it_has_a_pad_for_each_patch_and_its_own_end_behind_each_answer(student, template):
    written, teacher = writer(student, template)
    for record in records(2):
        both = written.write(record)
        for number in range(2):
            patches = int((both.student.image_S == number).sum())
            assert int((both.teacher.image_S == number).sum()) == patches > 0
        assert set(both.teacher.input_ids_S[both.teacher.is_placeholder_S].tolist()) == {0}
        ends = [
            label
            for label, span in zip(
                both.teacher.labels_S[both.teacher.labels_S != IGNORE].tolist(),
                both.teacher.char_spans,
                strict=True,
            )
            if span[1:] == (len(record.turns[span[0]].answer),) * 2
        ]
        end = teacher.convert_tokens_to_ids("<end>" if template is None else "<turn>")
        assert ends == [end] * sum(turn.learn for turn in record.turns)


@pytest.mark.parametrize("template", [None, unmarked(MARKED)])
def test_an_answers_losses_add_up_to_the_teachers(template):
    written, _ = writer("qwen2_5_vl", template)

    def losses_of(samples: list[Any]) -> torch.Tensor:
        counts = [int((sample.labels_S != IGNORE).sum()) for sample in samples]
        return torch.arange(1.0, sum(counts) + 1)

    for record in records(None):
        both = written.write(record)
        shared = score_twice_written(losses_of, [both])
        own = losses_of([both.teacher])
        for number in range(len(record.turns)):
            of_student = [n for n, span in enumerate(both.student.char_spans) if span[0] == number]
            of_teacher = [n for n, span in enumerate(both.teacher.char_spans) if span[0] == number]
            total = float(own[of_teacher].sum())
            assert float(shared[of_student].sum()) == pytest.approx(total, rel=1e-5)


def test_the_name_of_its_losses_follows_its_chat_template():
    names = {writer("qwen2_5_vl", template)[0].id for template in (None, MARKED, unmarked(MARKED))}
    assert len(names) == 3


def test_a_chat_template_that_cannot_be_used_is_the_teachers():
    with pytest.raises(ValueError, match="teacher's tokenizer cannot write .* use another teacher"):
        writer("qwen2_5_vl", "{{ messages[0]['content'] }}")


def test_a_teacher_without_a_default_template_or_an_end_is_refused():
    encoder = chat_encoder(processor("llava"), "<image>", max_length=99)
    teacher = make_teacher(None)
    teacher.chat_template = {"tool_use": unmarked(MARKED)}
    with pytest.raises(ValueError, match=r"the chat templates \['tool_use'\], none of which is"):
        OtherTokenizer(encoder, teacher, pad_id=0)
    teacher.chat_template = {"default": unmarked(MARKED), "tool_use": ""}
    assert OtherTokenizer(encoder, teacher, pad_id=0).id == writer("llava", unmarked(MARKED))[0].id
    teacher.chat_template, teacher.eos_token = None, None
    with pytest.raises(ValueError, match="has neither a chat template nor an eos token"):
        OtherTokenizer(encoder, teacher, pad_id=0)


def test_a_teacher_without_special_tokens_ends_no_answer():
    encoder = chat_encoder(processor("llava"), "<image>", max_length=99)
    bare = tokenizer([], "bytes")
    bare.add_tokens(["<pad>"])
    bare.chat_template = unmarked(MARKED)
    with pytest.raises(ValueError, match="no special token ends, .* use another teacher"):
        OtherTokenizer(encoder, bare, pad_id=bare.convert_tokens_to_ids("<pad>"))
