"""Frames of a video file are those that a plain pass over the whole file gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torch.utils.data import DataLoader

from regate_ds.data.collate import SampleDataset
from regate_ds.data.llava import video as video_module
from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.formats.sources import Sources
from regate_ds.data.llava.images import image_size, load_all, load_rgb
from regate_ds.data.llava.media import VideoFrame
from regate_ds.data.llava.parse import Parser
from regate_ds.data.llava.records import Cause, Record, SampleError
from regate_ds.data.llava.template import Template

av = pytest.importorskip("av", reason="PyAV is not installed")

CODECS = {"mp4": "libx264", "webm": "libvpx-vp9", "mkv": "mpeg4", "avi": "mjpeg"}


def film(path: Path, num_frames: int = 23) -> Path:
    """A video of a bar that moves; at least every 6th frame is a keyframe."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=10)
        stream.width, stream.height = 48, 32
        stream.pix_fmt = "yuvj420p" if path.suffix == ".avi" else "yuv420p"
        stream.codec_context.gop_size = 6
        for number in range(num_frames):
            picture = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
            picture.paste((255, 0, 0), (2 * number, 8, 2 * number + 4, 24))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def all_frames(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return len(a) == len(b) and not any(
        ImageChops.difference(x, y).getbbox() for x, y in zip(a, b, strict=True)
    )


def parse(folder: Path, name: str, *, frames: int | None = 4, question: str = "<video>") -> Record:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    parser = Parser(folder / "data.json", "set", Sources(folder, frames), verify_images=True)
    return parser.record(0, {"video": name, "conversations": turns})


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("num_taken", [1, 2, 5, 23, 40])
def test_frames_are_those_of_a_whole_pass_at_even_distances(
    tmp_path: Path, suffix: str, num_taken: int
):
    path = film(tmp_path / f"a.{suffix}")
    whole = all_frames(path)
    numbers = torch.linspace(0, len(whole) - 1, num_taken, dtype=torch.float64).floor().int()
    sources = [VideoFrame(path, number, num_taken) for number in range(num_taken)]
    found = load_all(sources)
    assert len(whole) == 23
    assert same(found, [whole[number] for number in numbers.tolist()])
    assert same(found[-1:], [load_rgb(sources[-1])])
    assert {image_size(sources[0])} == {image.size for image in found} == {(48, 32)}


def test_frames_that_wait_for_later_ones_are_found(tmp_path: Path):
    path = film(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.pts is not None]
    times = [packet.pts for packet in packets]
    assert times != sorted(times), "the codec made no such frames"
    assert 2 < sum(packet.is_keyframe for packet in packets) < 23
    assert same(load_all([VideoFrame(path, n, 23) for n in range(23)]), all_frames(path))


def test_a_record_takes_as_many_frames_as_are_asked_for(tmp_path: Path):
    path = film(tmp_path / "a.mp4")
    for question in ("<video>", "<image>"):
        record = parse(tmp_path, "a.mp4", question=question)
        assert record.images == tuple(VideoFrame(path, number, 4) for number in range(4))
        assert record.images_per_marker == (4,)


class Letters:
    """One token for each character."""

    bos_token_id, eos_token_id = 2, 3
    all_special_tokens, added_tokens_decoder = (), {}  # type: ignore[var-annotated]

    def get_vocab(self) -> dict[str, int]:
        return {"$": 1}

    def convert_tokens_to_ids(self, token: str) -> int:
        return 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[Any]]:
        spans = [(i, i + 1) for i in range(len(text))]
        return {"input_ids": [ord(char) for char in text], "offset_mapping": spans}


def dataset(record: Record) -> SampleDataset:
    encoder = Encoder(
        Letters(),
        image_token="$",
        num_image_tokens=lambda size: size[0] // 16,
        max_length=99,
        template=Template(),
    )
    return SampleDataset([record], encoder)


def test_a_worker_decodes_the_frames_of_a_sample(tmp_path: Path):
    path = film(tmp_path / "a.mp4")
    loader = DataLoader(dataset(parse(tmp_path, "a.mp4")), num_workers=1, collate_fn=list)
    [[loaded]] = loader
    assert loaded.encoded.image_S[loaded.encoded.is_placeholder_S].tolist() == [
        0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3,
    ]  # fmt: skip
    whole = all_frames(path)
    assert same(list(loaded.images), [whole[number] for number in (0, 7, 14, 22)])


def test_a_video_that_is_broken_names_file_and_record(tmp_path: Path):
    path = film(tmp_path / "a.mp4")
    record = parse(tmp_path, "a.mp4")
    path.write_bytes(b"film")
    with pytest.raises(Cause, match=r"^video file .*a\.mp4 is broken \("):
        parse(tmp_path, "a.mp4")
    for use in (dataset(record).encode, dataset(record).__getitem__):
        with pytest.raises(SampleError, match=r"record 0: video file .*a\.mp4 is broken \("):
            use(0)
    path.unlink()
    with pytest.raises(Cause, match=r"a\.mp4 is neither a folder of frames nor a file"):
        parse(tmp_path, "a.mp4")


def test_without_pyav_the_way_to_get_it_is_said(tmp_path: Path, monkeypatch: Any):
    path = film(tmp_path / "a.mp4")
    monkeypatch.setattr(video_module, "find_spec", lambda name: None)
    line = f"video {path} is a file, which PyAV decodes, and it is not installed; run "
    with pytest.raises(ValueError, match=line) as error:
        parse(tmp_path, "a.mp4")
    assert not isinstance(error.value, Cause)


def test_a_video_that_a_phone_took_upright_is_upright(tmp_path: Path):
    path = film(tmp_path / "a.mp4")
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    turned = (0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    content[start : start + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in turned)
    path.write_bytes(content)
    [frame] = load_all([VideoFrame(path, 0, 1)])
    assert image_size(VideoFrame(path, 0, 1)) == frame.size == (32, 48)
    left, right = (frame.convert("L").getpixel((x, 40)) for x in (1, 30))
    assert left > 200 > 50 > right  # type: ignore[operator]  # the stored bottom is white
