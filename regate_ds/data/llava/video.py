"""Take frames out of a video file by PyAV, which is loaded only where there is such a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from regate_ds.data.llava.media import VideoShape


def require_av(video: Path) -> None:
    """Raise ValueError, which says how to get PyAV, if it is not installed."""
    if find_spec("av") is None:
        raise ValueError(
            f"video {video} is a file, which PyAV decodes, and it is not installed; run "
            "`pip install av`, or give a folder of frames"
        )


def video_size(video: Path) -> tuple[int, int]:
    """Return the (width, height) of a video's frames, upright. OSError if it has none."""
    with _opened(video) as (container, stream):
        for frame in container.decode(stream):
            return _upright(frame).size
    raise OSError("it has no frames")


def read_frames(video: Path, places: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Decode the frames at ``places``, RGB and upright. OSError if the file is broken.

    places: (number, of): the frame that is ``number``-th where ``of`` frames are taken at even
        distances, the first and the last one of the video among them. A video that has fewer gives
        some of them twice.
    """
    return _read(
        video, lambda length: [number * (length - 1) // max(1, of - 1) for number, of in places]
    )


def read_numbers(video: Path, numbers: Sequence[int]) -> list[Image.Image]:
    """Decode the frames of these numbers, as ``read_frames`` does."""
    return _read(video, lambda _: numbers)


def video_shape(video: Path) -> VideoShape:
    """Look at a video's frames, of which one is decoded. OSError if it is broken."""
    with _opened(video) as (container, stream):
        shown, _ = _times(container, stream)
        rate = stream.average_rate
    return VideoShape(video_size(video), len(shown), float(rate) if rate else None, is_file=True)


def _read(video: Path, choose: Callable[[int], Sequence[int]]) -> list[Image.Image]:
    """Decode the frames of the numbers that are chosen by the number of all frames."""
    with _opened(video) as (container, stream):
        shown, starts = _times(container, stream)
        times = [shown[number] for number in choose(len(shown))]
        found = dict(_decode(container, stream, sorted(set(times)), starts))
    return [found[time] for time in times]


def _times(container: Any, stream: Any) -> tuple[list[int], dict[int, int]]:
    """Return when each frame is shown, in order, and where to seek to for each keyframe."""
    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    shown = sorted(packet.pts for packet in packets if not packet.is_discard)
    if not shown:
        raise OSError("it has no frames with a time; convert it to mp4")
    return shown, {packet.pts: packet.dts for packet in packets if packet.is_keyframe}


def _decode(
    container: Any, stream: Any, times: list[int], starts: dict[int, int]
) -> Iterator[tuple[int, Image.Image]]:
    """Yield the time and picture of the frames that are shown at ``times``, which rise.

    starts: where to seek to, for the time of each keyframe.
    """
    frames, last_key = iter(()), None
    for time in times:
        key = max((key for key in starts if key <= time), default=None)
        if key is None:
            raise OSError("it does not begin with a keyframe")
        if key != last_key:
            container.seek(starts[key], stream=stream)
            frames, last_key = container.decode(stream), key
        frame = next((frame for frame in frames if frame.pts == time), None)
        if frame is None:
            raise OSError(f"its frame at {time * stream.time_base} s cannot be decoded")
        yield time, _upright(frame)


@contextmanager
def _opened(video: Path) -> Iterator[tuple[Any, Any]]:
    import av  # pyright: ignore[reportMissingImports]
    from av.error import FFmpegError  # pyright: ignore[reportMissingImports]

    try:
        with av.open(str(video)) as container:
            if not container.streams.video:
                raise OSError("it has no video stream")
            yield container, container.streams.video[0]
    except FFmpegError as error:
        raise OSError(str(error)) from error


def _upright(frame: Any) -> Image.Image:
    return frame.to_image().rotate(frame.rotation, expand=True)
