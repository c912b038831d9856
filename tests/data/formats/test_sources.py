"""What may stand for an image or a video in a record, and what is refused."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageChops

from regate_ds.data.llava.images import load_rgb
from regate_ds.data.llava.media import InlineImage
from tests.data.formats.formats_helper import cause, draw_media, llava, messages, parse

NO_URL = "nothing is downloaded: save it and name the file"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_media(tmp_path)


def shown(entry: Any) -> list[dict[str, Any]]:
    """An image in each place where a record may have one."""
    return [
        llava("<image>", "a", image=entry),
        llava("<image>", "a", images=[entry]),
        messages("<image>", "a", images=[entry]),
        messages([{"type": "image", "image": entry}], "a"),
    ]


def test_an_image_is_a_path_bytes_a_data_address_or_a_picture_of_pillow(folder: Path):
    content = (folder / "a.png").read_bytes()
    encoded = base64.b64encode(content).decode()
    picture = load_rgb(folder / "a.png")
    for entry in (
        "a.png",
        str(folder / "a.png"),
        f"file://{folder}/a.png",
        {"bytes": None, "path": "a.png"},
        {"path": "a.png"},
        content,
        {"bytes": content, "path": "elsewhere.png"},
        f"data:image/png;base64,{encoded}",
        picture,
    ):
        for raw in shown(entry):
            [image] = parse(raw, folder).images
            assert not ImageChops.difference(load_rgb(image), picture).getbbox()
    [image] = parse(messages([{"type": "image", "base64": encoded}], "a")).images
    assert image == InlineImage(content, "any name")


def test_equal_pictures_of_pillow_are_one_picture_and_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.jpg", exif=exif)
    pictures = [Image.open(tmp_path / "a.jpg") for _ in range(2)]
    first, second = parse(llava("<image><image>", "a", images=pictures)).images
    assert first == second
    assert load_rgb(first).size == (2, 4)


@pytest.mark.parametrize(
    ("entry", "end"),
    [
        ("http://x.org/a.png", f"holds 'http://x.org/a.png'; {NO_URL}"),
        ("s3://x/a.png", f"holds 's3://x/a.png'; {NO_URL}"),
        ("data:image/png;base64,$", "holds data that is not base64 (Only base64 data is allowed)"),
        (3, "holds 3, not a file name"),
        ({"bytes": None, "path": None}, "holds None, not a file name"),
        ({"bytes": "x"}, "holds bytes of type str"),
        ({"<image_00>": "a.png"}, "holds {'<image_00>': 'a.png'}, not a file name"),
    ],
)
def test_what_is_no_image_is_refused(entry: Any, end: str, folder: Path):
    for raw, field in zip(shown(entry), ("image", "images", "images", "content")):
        assert cause(raw, folder) == f"field '{field}' {end}"


def test_broken_bytes_and_pictures_of_many_bits_are_refused():
    for raw in shown(b"no image"):
        # The same words each time: `regate data check --content` compares them.
        assert cause(raw).endswith("is broken (it is of no format that Pillow knows)")
    assert cause(shown(b"")[0]) == "image file 0 in 'images' is broken (it is empty)"
    for raw in shown(Image.new("I;16", (2, 2))):
        assert cause(raw).startswith("has an image with pixels of mode I;16; make it 8-bit")


def test_a_video_is_a_folder_of_frames_or_a_list_of_them(folder: Path):
    frames = tuple(folder / "clip" / f"{n}.png" for n in (1, 2))
    names = ["clip/1.png", "clip/2.png"]
    for entry in ("clip", {"path": "clip"}, f"file://{folder}/clip", names):
        for raw in (
            llava("<video>", "a", videos=[entry]),
            messages([{"type": "video", "video": entry}], "a"),
        ):
            record = parse(raw, folder)
            assert (record.images, record.images_per_marker) == (frames, (2,))


def test_the_frames_stand_where_a_question_about_a_video_has_image(folder: Path):
    record = parse(llava("<image>\nWhat?", "a", video="clip"), folder)
    assert record == parse(llava("<image>\nWhat?", "a", videos=["clip"]), folder)
    assert record.images_per_marker == (2,)
    assert cause(llava("<image> <image>", "a", video="clip"), folder) == (
        "has 2 <image> in its questions for 0 image entries"
    )


def test_names_that_begin_with_a_dot_are_no_frames(folder: Path):
    (folder / "clip" / "._1.png").write_bytes(b"a shadow file")
    assert len(parse(llava("<video>", "a", video="clip"), folder).images) == 2
    for n in (1, 2):
        (folder / "clip" / f"{n}.png").unlink()
    assert "holds no frames" in cause(llava("<video>", "a", video="clip"), folder)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ([], "field 'videos' holds a video without frames"),
        ({"bytes": b"x"}, "field 'videos' holds the bytes of a video; save it as a file"),
        ("https://x.org/a.mp4", f"field 'videos' holds 'https://x.org/a.mp4'; {NO_URL}"),
    ],
)
def test_what_is_no_video_is_refused(entry: Any, line: str):
    assert cause(llava("<video>", "a", videos=[entry])) == line


def test_a_video_file_needs_the_number_of_frames_even_where_bad_records_are_skipped(folder: Path):
    (folder / "a.mp4").write_bytes(b"film")
    with pytest.raises(ValueError, match=r"data\.video_frames=null: video .*a\.mp4 is a file") as e:
        parse(llava("<video>", "a", video="a.mp4"), folder)
    assert type(e.value) is ValueError
