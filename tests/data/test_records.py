"""The reader: what it takes from a LLaVA-format file, and every record it refuses."""

from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from regate_ds.data.llava.images import sizes_of
from regate_ds.data.llava.read import read_records
from regate_ds.data.llava.records import SampleError, Turn


def said(*texts: str) -> list[dict[str, str]]:
    """Turns that alternate, the human first."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def record(**fields: Any) -> dict[str, Any]:
    return {"id": "abc", "conversations": said("What?", "That.")} | fields


def write(folder: Path, *records: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((9, 7), 50).convert("RGB").save(path)
    return path


def refused(folder: Path, bad: Any) -> str:
    """The message for ``bad``, the second record of a file; with skip_bad it is only reported."""
    path = write(folder, record(), bad, record())
    with pytest.raises(SampleError) as error:
        read_records(path, name="set")
    kept, reported = read_records(path, name="set", skip_bad=True)
    assert [r.key for r in kept] == [("set", 0), ("set", 2)]
    assert [str(r) for r in reported] == [str(error.value.bad)]
    message = str(error.value)
    assert message.startswith(f"{path}, record 1")
    assert message.endswith("correct it, or leave such records out with data.skip_bad=true")
    return message


def test_a_record_keeps_its_turns_its_image_and_its_number(tmp_path: Path):
    image = draw(tmp_path / "cat.png")
    conversation = said("<image>\nWhat is it?", "A cat.", "Which colour?", "It is red.")
    conversation[3]["gold_spans"] = [[6, 9]]  # type: ignore[typeddict-item]
    path = write(tmp_path, record(image="cat.png", conversations=conversation))
    [read], bad = read_records(path, name="set")
    assert not bad
    assert read.key == ("set", 0)
    assert (read.id, read.source, read.images) == ("abc", path, (image,))
    assert read.turns == (
        Turn("<image>\nWhat is it?", "A cat."),
        Turn("Which colour?", "It is red.", ((6, 9),)),
    )


def test_images_are_looked_up_in_the_image_root(tmp_path: Path):
    image = draw(tmp_path / "elsewhere" / "cat.png")
    path = write(tmp_path, record(image="cat.png", conversations=said("<image>", "A cat.")))
    [read], _ = read_records(path, name="set", image_root=tmp_path / "elsewhere")
    assert read.images == (image,)


@pytest.mark.parametrize("field", ["image", "images"])
def test_several_images_belong_to_their_markers_in_order(tmp_path: Path, field: str):
    images = [draw(tmp_path / name) for name in ("z.png", "a.png")]
    conversation = said("<image> or", "Both.", "and <image>?", "No.")
    path = write(tmp_path, record(**{field: ["z.png", "a.png"]}, conversations=conversation))
    [read], _ = read_records(path, name="set")
    assert read.images == tuple(images)
    assert read.images_per_marker == (1, 1)


@pytest.mark.parametrize("fields", [{"image": None}, {"image": []}])
def test_a_null_image_beside_images_is_none(tmp_path: Path, fields: dict[str, Any]):
    image = draw(tmp_path / "cat.png")
    good = record(**fields, images=["cat.png"], conversations=said("<image>", "A cat."))
    [read], _ = read_records(write(tmp_path, good), name="set")
    assert read.images == (image,)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "gif"])
def test_an_image_that_is_cut_off_is_refused(tmp_path: Path, suffix: str):
    whole = draw(tmp_path / f"cat.{suffix}").read_bytes()
    good = record(image=f"cat.{suffix}", conversations=said("<image>", "A cat."))
    assert not read_records(write(tmp_path, good), name="set")[1]
    for keep in (len(whole) // 2, len(whole) * 9 // 10):
        (tmp_path / f"cat.{suffix}").write_bytes(whole[:keep])
        assert f"cat.{suffix} is broken" in refused(tmp_path, good)


def test_a_whole_jpeg_with_something_after_its_end_is_good(tmp_path: Path):
    image = draw(tmp_path / "cat.jpg")
    image.write_bytes(image.read_bytes() + bytes(10_000))
    good = record(image="cat.jpg", conversations=said("<image>", "A cat."))
    assert not read_records(write(tmp_path, good), name="set")[1]


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_pixels_of_more_than_eight_bits_are_refused_naming_the_mode(tmp_path: Path, mode: str):
    Image.new(mode, (8, 8)).save(tmp_path / "deep.tiff")
    bad = record(image="deep.tiff", conversations=said("<image>", "A cat."))
    assert f"has pixels of mode {mode};" in refused(tmp_path, bad)


def test_an_image_that_is_all_length_is_refused(tmp_path: Path):
    Image.new("L", (201, 1)).save(tmp_path / "line.png")
    bad = record(image="line.png", conversations=said("<image>", "A line."))
    assert "is 201 x 1 pixels" in refused(tmp_path, bad)


@pytest.mark.parametrize("fields", [{"image": "x" * 5000}, {"video": "x" * 5000}])
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, fields: dict[str, str]):
    marker = f"<{next(iter(fields))}>"
    message = refused(tmp_path, record(**fields, conversations=said(marker, "A cat.")))
    assert "cannot be looked up (File name too long)" in message


@pytest.mark.parametrize("texts", [("What \ud83d?", "That."), ("What?", "That \ude00.")])
def test_half_a_character_is_refused_in_a_message_that_can_be_printed(
    tmp_path: Path, texts: tuple[str, str]
):
    message = refused(tmp_path, record(id="\ud83d", conversations=said(*texts)))
    assert "half of a character" in message
    assert message.encode()


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path):
    frames = [draw(tmp_path / "clip" / f"frame{i}.png") for i in (1, 2, 10, 100)]
    good = record(video="clip", conversations=said("<video>", "A cat."))
    [read], _ = read_records(write(tmp_path, good), name="set")
    assert read.images == tuple(frames)


@pytest.mark.parametrize("fields", [{}, {"image": None, "video": None}, {"images": []}])
def test_a_record_without_an_image_is_good(tmp_path: Path, fields: dict[str, Any]):
    [read], _ = read_records(write(tmp_path, record(**fields)), name="set")
    assert read.images == ()
    assert read.images_per_marker == ()


def test_a_video_is_its_frames_by_name_at_the_place_of_its_marker(tmp_path: Path):
    frames = [draw(tmp_path / "clip" / f"frame_{i}.png") for i in (5, 2, 7, 1, 6, 3, 8, 4)]
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    image = draw(tmp_path / "cat.png")
    conversation = said("<video> then <image>", "A cat.")
    path = write(tmp_path, record(image="cat.png", video="clip", conversations=conversation))
    [read], _ = read_records(path, name="set")
    assert read.images == (*sorted(frames), image)
    assert read.images_per_marker == (8, 1)


def test_a_line_is_a_record_in_a_jsonl_file(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    odd = record(conversations=said("a\u2028b", "c"))
    path.write_text(f"{json.dumps(odd, ensure_ascii=False)}\n\n{json.dumps(record())}\n", "utf-8")
    records, _ = read_records(path, name="set")
    assert [r.key for r in records] == [("set", 0), ("set", 1)]
    assert records[0].turns[0].question == "a\u2028b"


def test_a_jsonl_line_that_is_not_json_is_a_bad_record(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(record())}\n{{broken\n")
    with pytest.raises(SampleError, match="record 1: is not JSON"):
        read_records(path, name="set")
    records, bad = read_records(path, name="set", skip_bad=True)
    assert (len(records), len(bad)) == (1, 1)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no data file .*absent\.json"):
        read_records(tmp_path / "absent.json", name="set", skip_bad=True)


@pytest.mark.parametrize("content", [b"{broken", b"\xff\xfe"])
def test_a_file_that_is_not_json_is_named_even_when_bad_records_are_skipped(
    tmp_path: Path, content: bytes
):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.json is not JSON"):
        read_records(path, name="set", skip_bad=True)


def test_a_file_that_is_not_a_list_is_refused(tmp_path: Path):
    path = tmp_path / "data.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds a dict; give a JSON list"):
        read_records(path, name="set", skip_bad=True)


def test_a_message_names_file_record_and_id(tmp_path: Path):
    message = refused(tmp_path, record(conversations=[]))
    assert f"{tmp_path / 'data.json'}, record 1 (id abc): has no list 'conversations'" in message


@pytest.mark.parametrize("bad", ["text", 3, None, []])
def test_a_record_that_is_not_an_object_is_refused(tmp_path: Path, bad: Any):
    assert "is no object" in refused(tmp_path, bad)


def test_a_missing_image_is_refused(tmp_path: Path):
    bad = record(image="gone.png", conversations=said("<image>", "A cat."))
    assert f"there is no image file {tmp_path / 'gone.png'}" in refused(tmp_path, bad)


@pytest.mark.parametrize("keep", [0, 20, -15])
def test_a_broken_image_is_refused(tmp_path: Path, keep: int):
    whole = draw(tmp_path / "cat.png").read_bytes()
    (tmp_path / "cat.png").write_bytes(whole[:keep])
    bad = record(image="cat.png", conversations=said("<image>", "A cat."))
    assert f"image file {tmp_path / 'cat.png'} is broken" in refused(tmp_path, bad)


def test_a_damaged_image_is_refused(tmp_path: Path):
    whole = bytearray(draw(tmp_path / "cat.png").read_bytes())
    whole[-20] ^= 0xFF
    (tmp_path / "cat.png").write_bytes(whole)
    bad = record(image="cat.png", conversations=said("<image>", "A cat."))
    assert "is broken" in refused(tmp_path, bad)


@pytest.mark.parametrize("verify_images", [True, False])
def test_an_image_of_more_pixels_than_memory_has_room_for_is_refused(tmp_path, verify_images):
    content = bytearray(draw(tmp_path / "cat.png").read_bytes())
    content[16:24] = (20_000).to_bytes(4, "big") * 2  # Its width and height.
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "cat.png").write_bytes(content)
    path = write(tmp_path, record(image="cat.png", conversations=said("<image>", "A cat.")))
    told = r"is broken \(Image size \(400000000 pixels\) exceeds limit"
    with pytest.raises(SampleError, match=told):
        _read_with_sizes(path, verify_images)


def _read_with_sizes(path: Path, verify_images: bool) -> None:
    (one,), _ = read_records(path, name="set", verify_images=verify_images)
    list(sizes_of(one))


def test_without_verification_only_missing_images_are_refused(tmp_path: Path):
    (tmp_path / "cat.png").write_bytes(b"no image")
    good = record(image="cat.png", conversations=said("<image>", "A cat."))
    records, _ = read_records(write(tmp_path, good), name="set", verify_images=False)
    assert len(records) == 1
    bad = record(image="gone.png", conversations=said("<image>", "A cat."))
    with pytest.raises(SampleError, match="there is no image file"):
        read_records(write(tmp_path, bad), name="set", verify_images=False)


def test_a_video_that_is_not_there_is_refused(tmp_path: Path):
    bad = record(video="clip", conversations=said("<video>", "A film."))
    assert "clip is neither a folder of frames nor a file" in refused(tmp_path, bad)


def test_a_video_without_frames_is_refused(tmp_path: Path):
    (tmp_path / "clip").mkdir()
    bad = record(video="clip", conversations=said("<video>", "A film."))
    assert "holds no frames" in refused(tmp_path, bad)


def test_a_broken_frame_is_refused(tmp_path: Path):
    draw(tmp_path / "clip" / "a.png")
    (tmp_path / "clip" / "b.png").write_bytes(b"no image")
    bad = record(video="clip", conversations=said("<video>", "A film."))
    assert f"image file {tmp_path / 'clip' / 'b.png'} is broken" in refused(tmp_path, bad)


@pytest.mark.parametrize(
    ("question", "fields", "cause"),
    [
        ("no marker", {"image": "cat.png"}, "has 0 <image> in its questions for 1 image"),
        ("<image>", {}, "has 1 <image> in its questions for 0 image"),
        ("<image><image>", {"images": ["cat.png"]}, "has 2 <image> in its questions for 1 image"),
        ("<video>", {"image": "cat.png"}, "has 0 <image> in its questions for 1 image"),
        ("<image>", {"image": "cat.png", "video": "clip"}, "has 0 <video> in its questions for 1"),
    ],
)
def test_markers_that_do_not_match_the_files_are_refused(
    tmp_path: Path, question: str, fields: dict[str, Any], cause: str
):
    draw(tmp_path / "cat.png")
    assert cause in refused(tmp_path, record(**fields, conversations=said(question, "A cat.")))


def test_a_marker_in_an_answer_is_refused(tmp_path: Path):
    bad = record(conversations=said("What?", "An <image>."))
    assert "turn 1 is an answer that holds <image>" in refused(tmp_path, bad)


def test_both_image_and_images_are_refused(tmp_path: Path):
    draw(tmp_path / "cat.png")
    bad = record(image="cat.png", images=["cat.png"], conversations=said("<image>", "A cat."))
    assert "has both 'image' and 'images'" in refused(tmp_path, bad)


@pytest.mark.parametrize("names", [3, "", ["cat.png", None], {"file": "cat.png"}])
def test_an_image_field_that_names_no_file_is_refused(tmp_path: Path, names: Any):
    assert "not a file name" in refused(tmp_path, record(image=names))


@pytest.mark.parametrize("missing", [{}, {"conversations": None}, {"conversations": "text"}])
def test_a_record_without_conversations_is_refused(tmp_path: Path, missing: dict[str, Any]):
    assert "has no list 'conversations'" in refused(tmp_path, missing)


@pytest.mark.parametrize("part", [{"from": "gpt"}, {"value": "That."}, "That."])
def test_a_turn_without_its_fields_is_refused(tmp_path: Path, part: Any):
    bad = record(conversations=[*said("What?"), part])
    assert "turn 1 needs the fields 'from' and 'value'" in refused(tmp_path, bad)


def test_an_unknown_role_is_refused(tmp_path: Path):
    bad = record(conversations=[{"from": "robot", "value": "Be kind."}, *said("What?", "That.")])
    assert "turn 0 has the unknown role 'robot'; known: 'human', 'user'" in refused(tmp_path, bad)


@pytest.mark.parametrize("roles", [("gpt", "human"), ("human", "human"), ("human", "gpt", "gpt")])
def test_turns_that_do_not_alternate_are_refused(tmp_path: Path, roles: tuple[str, ...]):
    bad = record(conversations=[{"from": role, "value": "text"} for role in roles])
    assert "should speak" in refused(tmp_path, bad)


def test_a_question_without_an_answer_is_refused(tmp_path: Path):
    bad = record(conversations=said("What?", "That.", "And?"))
    assert "its 3 turns do not pair up" in refused(tmp_path, bad)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_refused(tmp_path: Path, answer: str):
    bad = record(conversations=said("What?", "That.", "And?", answer))
    assert "turn 3 is an empty answer" in refused(tmp_path, bad)


def test_a_turn_that_is_not_text_is_refused(tmp_path: Path):
    bad = record(conversations=[*said("What?"), {"from": "gpt", "value": 7}])
    assert "turn 1 has the value 7, not a text" in refused(tmp_path, bad)


@pytest.mark.parametrize("spans", [[[0, 6]], [[2, 2]], [[-1, 2]], [[1]], [["a", "b"]], 4, [3]])
def test_gold_spans_outside_the_answer_are_refused(tmp_path: Path, spans: Any):
    answer = {"from": "gpt", "value": "That.", "gold_spans": spans}
    bad = record(conversations=[*said("What?"), answer])
    assert "has the gold_spans" in refused(tmp_path, bad)


def test_a_sample_error_survives_the_way_out_of_a_worker_process(tmp_path: Path):
    with pytest.raises(SampleError) as caught:
        read_records(write(tmp_path, record(conversations=[])), name="set")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert type(caught.value)("a message alone").bad is None
