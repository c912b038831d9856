"""A tokenizer in the place of another: how it cuts texts, and what it keeps of the other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken

from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.recipe.vocabulary.bpe import added_ids, train_in_place_of
from regate_ds.recipe.vocabulary.pieces import old_pieces
from tests.support.processors import MAKERS, can_make, processor

TEXTS = [
    "The number seven is red.\n\nIt's 12345 small, isn't it?",
    "The number two is red; größer, 數字, 🙂.\n  def f(x):\n\treturn x",
] * 3


def other_tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("It's RED, isn't it?", ["It", "'s", " RED", ",", " isn", "'t", " it", "?"]),
        ("We'LL see", ["We", "'LL", " see"]),
        ("12345 apples, 7", ["123", "45", " apples", ",", " ", "7"]),
        ("a  b", ["a", " ", " b"]),
        ("end.  ", ["end", ".", "  "]),
        ("one\n\n  two", ["one", "\n\n", " ", " two"]),
        ("x  \n y", ["x", "  \n", " y"]),
        ("f(x):\r\n\ty", ["f", "(x", "):\r\n", "\ty"]),
        ("-größe數", ["-größe數"]),
        (" --- yes", [" ---", " yes"]),
    ],
)
def test_texts_are_cut_before_merges(text, pieces):
    rules = train_in_place_of(other_tokenizer(), TEXTS, size=300).backend_tokenizer
    cut = rules.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


@pytest.mark.parametrize("name", [name for name in MAKERS if can_make(name)])
def test_it_keeps_what_is_not_words_of_every_models_tokenizer(name):
    other = processor(name).tokenizer
    new = train_in_place_of(other, TEXTS, size=len(added_ids(other)) + 356)
    added = [other.added_tokens_decoder[n] for n in sorted(added_ids(other))]
    assert [new.added_tokens_decoder[n] for n in range(len(added))] == added
    assert new.chat_template == other.chat_template
    assert new.special_tokens_map == other.special_tokens_map
    for text in TEXTS:
        ids = new(text).input_ids
        assert new.decode(ids, skip_special_tokens=True) == text
        assert len(new(text, add_special_tokens=False).input_ids) < len(text) / 1.5
        assert added_of(new, ids) == added_of(other, other(text).input_ids)


def added_of(tokenizer, ids: list[int]) -> list[str]:
    added = added_ids(tokenizer)
    return tokenizer.convert_ids_to_tokens([one for one in ids if one in added])


def test_a_texts_unicode_form_stays_that_of_the_other():
    other = processor("qwen2_vl").tokenizer
    assert other.decode(other("e\u0301").input_ids) == "\u00e9"
    new = train_in_place_of(other, TEXTS, size=500)
    assert new.decode(new("e\u0301").input_ids) == "\u00e9"
    new = train_in_place_of(other_tokenizer(), TEXTS, size=500)
    assert new.decode(new("e\u0301").input_ids) == "e\u0301"


def test_an_added_token_that_is_none_of_the_special_ones_stays_so():
    other = other_tokenizer()
    other.add_tokens([AddedToken("<call>", special=False, normalized=False)])
    new = train_in_place_of(other, TEXTS, size=400)
    ids = new("<call>red", add_special_tokens=False).input_ids
    assert new.decode(ids, skip_special_tokens=True) == "<call>red"


def test_too_few_tokens_are_refused():
    with pytest.raises(
        ValueError, match=r"--size 259: 256 bytes and 4 added tokens need 260; give"
    ):
        train_in_place_of(other_tokenizer(), TEXTS, size=259)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next"])
def test_old_pieces_say_what_the_new_token_says(name):
    old = processor(name).tokenizer
    new = train_in_place_of(old, TEXTS, size=700)
    pieces, shared = old_pieces(old, new), 0
    assert len(pieces) == len(new)
    for number, token in enumerate(new.convert_ids_to_tokens(range(len(new)))):
        if number in added_ids(new):
            assert old.convert_ids_to_tokens(pieces[number]) == [token]
            continue
        said = new.decode([number])
        if "\ufffd" not in said:
            # Sentencepiece's decoders drop a space at the very beginning.
            assert old.decode([*old.encode("a", add_special_tokens=False), *pieces[number]]) == (
                f"a{said}"
            )
        shared += len(pieces[number]) == 1
    assert 260 < shared < len(new)


def test_a_part_of_a_character_is_the_bytes_of_it_for_sentencepiece():
    old = processor("llava_next").tokenizer
    new = train_in_place_of(old, TEXTS, size=700)
    (number,) = (n for n in range(len(new)) if new.convert_ids_to_tokens(n) == "\u00c3")
    assert old.convert_ids_to_tokens(old_pieces(old, new)[number]) == ["<0xC3>"]


def test_a_slow_tokenizer_is_named():
    with pytest.raises(ValueError, match="a SimpleNamespace is a slow tokenizer, whose rules"):
        train_in_place_of(SimpleNamespace(), TEXTS, size=300)
