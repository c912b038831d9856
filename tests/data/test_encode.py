"""Records as tokens: what is labelled, where images stand, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.records import Record, SampleError, Turn
from regate_ds.data.llava.template import Template, text_segments
from regate_ds.data.tokens import special_tokens

IMAGE, BOS, EOS = 1, 2, 3


class CharTokenizer:
    """One token for each character, its id the code point; "$" is the image token."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS
    all_special_tokens = ("</s>",)
    added_tokens_decoder: ClassVar[dict[int, Any]] = {
        7: SimpleNamespace(content="<tool>", special=True),
        8: SimpleNamespace(content="plain", special=False),
    }

    def get_vocab(self) -> dict[str, int]:
        return {"$": IMAGE}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]

    def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
        assert options == {"add_special_tokens": False, "return_offsets_mapping": True}
        ids = [IMAGE if char == "$" else ord(char) for char in text]
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def build(tokenizer: Any = None, *, max_length: int = 1000, **template: str) -> Encoder:
    return Encoder(
        tokenizer or CharTokenizer(),
        image_token="$",
        num_image_tokens=lambda size: size[0] // 2,
        max_length=max_length,
        template=Template(**{"user": "U:", "assistant": " A:", "separator": " "} | template),
    )


def make(*turns: tuple[str, str], images: tuple[Path, ...] = (), per: tuple[int, ...] = ()):
    return Record(
        key=("set", 4),
        id="abc",
        images=images,
        images_per_marker=per or (1,) * len(images),
        turns=tuple(Turn(question, answer) for question, answer in turns),
        source=Path("data.json"),
    )


def draw(path: Path, width: int) -> Path:
    Image.new("RGB", (width, 3)).save(path)
    return path


def spell(ids: list[int]) -> str:
    """Token ids as text: "^" begins, "|" ends an answer, "." has no label."""
    names = {BOS: "^", EOS: "|", IMAGE: "$", IGNORE: "."}
    return "".join(names[i] if i in names else chr(i) for i in ids)


def test_a_position_is_labelled_with_the_next_token_where_that_belongs_to_an_answer():
    sample = build().encode(make(("q", "yes"), ("r", "no")))
    assert spell(sample.input_ids_S.tolist()) == "^U:q A:yes| U:r A:no|"
    assert spell(sample.labels_S.tolist()) == "......yes|" + "......." + "no|."
    assert sample.key == ("set", 4)
    assert sample.input_ids_S.dtype == sample.labels_S.dtype == torch.int64


def test_every_label_knows_its_characters_in_the_answer():
    sample = build().encode(make(("q", "ab"), ("r", "c")))
    assert sample.char_spans == ((0, 0, 1), (0, 1, 2), (0, 2, 2), (1, 0, 1), (1, 1, 1))
    assert len(sample.char_spans) == int((sample.labels_S != IGNORE).sum())


def test_a_tokenizer_without_a_first_token_begins_with_the_prompt():
    tokenizer = CharTokenizer()
    tokenizer.bos_token_id = None
    sample = build(tokenizer, system="S ").encode(make(("q", "y")))
    assert spell(sample.input_ids_S.tolist()) == "S U:q A:y|"


def test_the_first_token_of_a_sample_is_no_target():
    tokenizer = CharTokenizer()
    tokenizer.bos_token_id = None
    sample = build(tokenizer, user="", assistant="").encode(make(("", "yes")))
    assert spell(sample.labels_S.tolist()) == "es|."
    assert sample.char_spans == ((0, 1, 2), (0, 2, 3), (0, 3, 3))


def test_each_image_becomes_as_many_placeholders_as_its_size_asks_for(tmp_path: Path):
    images = (draw(tmp_path / "a.png", 4), draw(tmp_path / "b.png", 6))
    sample = build().encode(make(("<image>or<image>", "y"), images=images))
    assert spell(sample.input_ids_S.tolist()) == "^U:$$or$$$ A:y|"
    assert spell(sample.labels_S.tolist()) == "............y|."
    number = [0 if i in (3, 4) else 1 if i in (7, 8, 9) else -1 for i in range(15)]
    assert sample.image_S.tolist() == number
    assert sample.is_placeholder_S.tolist() == [token == "$" for token in "^U:$$or$$$ A:y|"]
    assert sample.images == images


def test_a_video_becomes_the_placeholders_of_all_its_frames(tmp_path: Path):
    images = tuple(draw(tmp_path / f"{i}.png", 2) for i in range(4))
    record = make(("<image>?<video>!", "y"), images=images, per=(1, 3))
    sample = build(image_start="[", image_end="]").encode(record)
    assert spell(sample.input_ids_S.tolist()) == "^U:[$]?[$][$][$]! A:y|"


def test_images_of_later_turns_follow_those_of_earlier_ones(tmp_path: Path):
    images = (draw(tmp_path / "a.png", 2), draw(tmp_path / "b.png", 6))
    sample = build().encode(make(("<image>", "y"), ("<image>", "n"), images=images))
    assert spell(sample.input_ids_S.tolist()) == "^U:$ A:y| U:$$$ A:n|"


@pytest.mark.parametrize("max_length", range(8, 13))
def test_a_long_sample_is_cut_and_its_last_position_predicts_nothing(max_length: int):
    record = make(("q", "yes"), ("r", "no"))
    whole, cut = build().encode(record), build(max_length=max_length).encode(record)
    assert torch.equal(cut.input_ids_S, whole.input_ids_S[:max_length])
    assert torch.equal(cut.labels_S[:-1], whole.labels_S[: max_length - 1])
    assert cut.labels_S[-1] == IGNORE
    num_labels = int((cut.labels_S != IGNORE).sum())
    assert cut.char_spans == whole.char_spans[:num_labels]


def refused(encoder: Encoder, record: Record, cause: str) -> None:
    with pytest.raises(SampleError) as error:
        encoder.encode(record)
    assert str(error.value).startswith("data.json, record 4 (id abc): ")
    assert cause in str(error.value)
    assert str(error.value).startswith(f"{error.value.bad}; ")


def test_a_cut_through_an_image_is_refused(tmp_path: Path):
    record = make(("q", "y"), ("<image>", "n"), images=(draw(tmp_path / "a.png", 4),))
    text = "^U:q A:y| U:$$ A:n|"
    assert spell(build().encode(record).input_ids_S.tolist()) == text
    for max_length in (text.index("$"), text.index("$") + 1):
        cause = f"cutting its {len(text)} tokens at data.max_length={max_length} would cut an image"
        refused(build(max_length=max_length), record, cause)
    build(max_length=text.rindex("$") + 1).encode(record)


def test_a_cut_that_leaves_no_answer_is_refused():
    record = make(("q", "yes"))
    num_prompt = len("^U:q A:")
    refused(build(max_length=num_prompt), record, "leaves no answer token to learn from")
    build(max_length=num_prompt + 1).encode(record)


@pytest.mark.parametrize("token", ["$", "</s>", "<tool>"])
@pytest.mark.parametrize("where", ["question", "answer"])
def test_a_text_that_holds_a_special_token_is_refused(where: str, token: str):
    texts = {"question": "q", "answer": "plain"} | {where: f"a {token} b"}
    record = make(("q", "y"), (texts["question"], texts["answer"]))
    refused(build(), record, f"its {where} 2 holds {token!r}, a special token's text")


@pytest.mark.parametrize("text", ["a $ b", "<image>", "<video>"])
def test_a_template_that_stands_for_an_image_is_refused(text: str):
    with pytest.raises(ValueError, match=r"data\.template\.user=.* stands for an image"):
        build(user=text)


def test_an_image_that_the_model_refuses_is_a_bad_record(tmp_path: Path):
    def refuse(size: tuple[int, int]) -> int:
        raise ValueError("too thin")

    encoder = Encoder(
        CharTokenizer(),
        image_token="$",
        num_image_tokens=refuse,
        max_length=99,
        template=Template(),
    )
    record = make(("<image>", "y"), images=(draw(tmp_path / "a.png", 2),))
    refused(encoder, record, "does not suit the model (too thin)")


def test_an_image_that_broke_after_reading_is_refused(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no image")
    record = make(("<image>", "y"), images=(tmp_path / "a.png",))
    refused(build(), record, f"image file {tmp_path / 'a.png'} is broken")


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = CharTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="has no eos token"):
        build(tokenizer)


def test_an_image_token_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(ValueError, match="does not know the image token '<img>'"):
        Encoder(
            CharTokenizer(),
            image_token="<img>",
            num_image_tokens=lambda size: 1,
            max_length=10,
            template=Template(),
        )


def test_a_system_text_of_the_record_stands_in_the_place_of_the_templates():
    record = make(("q", "yes"), ("r", "no"))
    own = replace(record, system="Be.")
    around = {"system": "S ", "system_start": "[", "system_end": "] "}
    assert spell(build(**around).encode(record).input_ids_S.tolist()) == "^S U:q A:yes| U:r A:no|"
    sample = build(**around).encode(own)
    assert spell(sample.input_ids_S.tolist()) == "^[Be.] U:q A:yes| U:r A:no|"
    assert spell(sample.labels_S.tolist()) == "............yes|" + "......." + "no|."
    refused(build(), replace(record, system="a <tool>"), "its system text holds '<tool>'")


def test_an_answer_that_is_not_learnt_keeps_its_tokens_and_has_no_labels():
    record = make(("q", "yes"), ("r", "no"), ("s", "so"))
    all_learnt = build().encode(record)
    turns = tuple(replace(turn, learn=turn.question == "r") for turn in record.turns)
    sample = build().encode(replace(record, turns=turns))
    assert torch.equal(sample.input_ids_S, all_learnt.input_ids_S)
    assert spell(sample.labels_S.tolist()) == "." * 17 + "no|" + "." * 11
    assert sample.char_spans == ((1, 0, 1), (1, 1, 2), (1, 2, 2))
    cause = f"cutting its {len(sample)} tokens at data.max_length=17 leaves no answer token"
    refused(build(max_length=17), replace(record, turns=turns), cause)


@pytest.mark.parametrize("own", ["", "Be."])
def test_text_segments_are_the_texts_that_the_tokenizer_gets(tmp_path: Path, own: str):
    asked: list[str] = []

    class Listening(CharTokenizer):
        def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
            asked.append(text)
            return super().__call__(text, **options)

    images = (draw(tmp_path / "a.png", 2), draw(tmp_path / "b.png", 2))
    record = make(("<image>q<image>", "yes"), ("r", "no"), images=images)
    record = replace(record, system=own or None)
    template = {"system": "S", "image_start": "[", "image_end": "]"}
    build(Listening(), **template).encode(record)
    settings = replace(Template(), user="U:", assistant=" A:", separator=" ", **template)
    assert sorted(text_segments(record, settings)) == sorted(asked)


def test_the_pattern_of_special_tokens_has_one_order_in_every_process():
    marks = [f"<{letter}>" for letter in "hcafbgde"]
    tokenizer = SimpleNamespace(all_special_tokens=marks, added_tokens_decoder={})
    found = special_tokens(tokenizer, "<longer>")
    assert found.pattern.split("|") == ["<longer>", *sorted(marks)]


def test_a_model_that_reads_images_by_their_runs_is_given_none_that_touch(tmp_path: Path):
    images = (draw(tmp_path / "a.png", 4), draw(tmp_path / "b.png", 6))
    touching = make(("<image><image>which", "y"), images=images)
    frames = make(("<video>which", "y"), images=images, per=(2,))
    apart = make(("<image> <image>which", "y"), images=images)
    strict = build().with_images_apart()
    for record in (touching, frames):
        with pytest.raises(SampleError, match="record 4 .*two images or frames with nothing betwe"):
            strict.encode(record)
        marked = build(image_start="(", image_end=")").with_images_apart().encode(record)
        assert spell(marked.input_ids_S.tolist()) == "^U:($$)($$$)which A:y|"
        build().encode(record)
    assert spell(strict.encode(apart).input_ids_S.tolist()) == "^U:$$ $$$which A:y|"
