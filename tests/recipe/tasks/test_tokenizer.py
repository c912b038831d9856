"""The small tokenizer: lossless, whole words, offsets without spaces."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from regate_ds.data.llava.read import read_records
from regate_ds.data.llava.template import Template, text_segments
from regate_ds.recipe.tasks.digits.scenes import build_digits
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer

TEXTS = ["The number seven is red.", "The number two is red, it is small."] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=280)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "text", [*TEXTS[:2], "  Z\u00fcrich,\t\u6771\u4eac \U0001f600\n", "", "x" * 50]
)
def test_any_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerFast, text: str):
    decoded = tokenizer.decode(ids(tokenizer, text), clean_up_tokenization_spaces=False)
    assert decoded == text


def test_begin_end_pad_and_image_are_single_tokens(tokenizer: PreTrainedTokenizerFast):
    special = ["<s>", "</s>", "<pad>", "<image>"]
    assert [ids(tokenizer, token) for token in special] == [[0], [1], [2], [3]]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.unk_token is None


def test_the_image_token_may_have_another_name():
    tokenizer = train_tokenizer(TEXTS, vocab_size=280, image_token="<|image_pad|>")
    assert ids(tokenizer, "<|image_pad|>") == [3]
    assert "<image>" not in tokenizer.get_vocab()


def test_no_special_token_is_added_unasked(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer("red")["input_ids"] == ids(tokenizer, "red")


def test_offsets_leave_out_the_space_before_a_word(tokenizer: PreTrainedTokenizerFast):
    text = "The number two is red."
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoding["offset_mapping"]]
    assert not any(" " in piece for piece in pieces)
    assert "".join(pieces) == text.replace(" ", "")


def test_training_has_no_more_entries_than_asked_for(tokenizer: PreTrainedTokenizerFast):
    assert len(tokenizer) == 280
    assert max(tokenizer.get_vocab().values()) == 279


def test_the_order_of_the_texts_changes_nothing(tokenizer: PreTrainedTokenizerFast):
    other = train_tokenizer(TEXTS[::-1], vocab_size=280)
    assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    assert len(train_tokenizer(TEXTS, vocab_size=260)) == 260
    with pytest.raises(ValueError, match="vocab_size 259 has no room .* at least 260"):
        train_tokenizer(TEXTS, vocab_size=259)


def test_a_saved_tokenizer_loads_as_it_was(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    assert dict(loaded(TEXTS[0], **options)) == dict(tokenizer(TEXTS[0], **options))


def test_512_entries_make_every_word_of_the_digits_set_one_token(tmp_path: Path):
    build_digits(tmp_path, num_train=1500, num_test=100, seed=0)
    train, test = (read_records(tmp_path / f"{n}.json", name=n)[0] for n in ("train", "test"))
    texts = (text for record in train for text in text_segments(record, Template()))
    tokenizer = train_tokenizer(texts, vocab_size=512)
    for turn in (turn for record in test for turn in record.turns):
        encoding = tokenizer(turn.answer, add_special_tokens=False, return_offsets_mapping=True)
        pieces = [turn.answer[start:end] for start, end in encoding["offset_mapping"]]
        spaced = turn.answer.replace(".", " .").replace(",", " ,")
        assert pieces == spaced.split()
