"""Samples with videos equal those of the processor's own call, for random conversations.

Where torchvision is not installed a stand-in takes the place of transformers' part for videos.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regate_ds.data.chat.encode import ChatEncoder
from regate_ds.data.chat.video_text import PATCHES
from regate_ds.data.chat.vision import ProcessorVision
from regate_ds.data.llava.clips import visuals_of
from regate_ds.data.llava.media import Video
from regate_ds.data.llava.parse import Parser
from regate_ds.data.llava.records import Record, SampleError
from regate_ds.families.table import PROCESSORS
from regate_ds.recipe.students.processor import chat_encoder
from tests.data.chat.test_processors import wanted_labels
from tests.support.chat_templates import MARKED
from tests.support.conversations import frames_of, random_image, random_record, said, with_videos
from tests.support.processors import MAKERS, processor
from tests.support.videos import ALL_NAMES, NAMES, ONE_LENGTH, film, random_frames, video_processor

each_processor = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    pytest.importorskip("av", reason="PyAV is not installed")
    folder = tmp_path_factory.mktemp("films")
    sizes = [(48, 32), (32, 48), (64, 16)]
    return [film(folder / f"{n}.mp4", 9 + 5 * n, rate=5 + n, size=s) for n, s in enumerate(sizes)]


def encoder_of(name: str, **fields: Any) -> ChatEncoder:
    return chat_encoder(video_processor(name), MAKERS[name][2], max_length=100_000, **fields)


def records_of(name: str, seed: str, make: Any) -> list[Record]:
    random = Random(f"{name} {seed}")
    records = [random_record(random, n, num_images=1 + n % 3) for n in range(8)]
    return [with_videos(random, record, lambda: make(random)) for record in records]


def own_call(name: str, records: list[Record], **given: Any) -> dict[str, Any]:
    """Call the processor itself with all frames of the records' videos."""
    videos = [each for record in records for each in record.images if isinstance(each, Video)]
    about = [_about(video) for video in videos]
    found = video_processor(name).apply_chat_template(
        [said(record) for record in records],
        chat_template=MARKED[MAKERS[name][1]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={
            "padding": True,
            "padding_side": "right",
            **({"video_metadata": about, **given} if about else {}),
        },
    )
    assert found.pop("attention_mask").any()
    return dict(found)


def _about(video: Video) -> dict[str, Any]:
    count, fps = len(frames_of(video)), None
    if isinstance(video.source, Path):
        import av

        with av.open(str(video.source)) as container:
            fps = float(container.streams.video[0].average_rate)  # type: ignore[arg-type]
    return {"total_num_frames": count, "fps": fps, "frames_indices": list(range(count))}


def compare(name: str, encoder: ChatEncoder, record: Record, **given: Any) -> Tensor:
    """Hold a sample against the processor's own call; return which image each token is of."""
    vision, sample = ProcessorVision(video_processor(name), MAKERS[name][2]), encoder.encode(record)
    own = own_call(name, [record], **given)
    ids_S, mask_S = own.pop("input_ids")[0], torch.as_tensor(own.pop("assistant_masks"))[0]
    assert torch.equal(sample.input_ids_S, ids_S)
    assert torch.equal(sample.labels_S, wanted_labels(record, ids_S, mask_S))
    inputs = vision.extra_inputs(sample.input_ids_S[None], sample.is_placeholder_S[None])
    inputs |= vision.sample_pixels([visuals_of(record, sample.images)])
    assert inputs.keys() == own.keys()
    for key, value in own.items():
        assert torch.equal(inputs[key], torch.as_tensor(value)), key
    return sample.image_S


@each_processor
def test_a_sample_with_lists_of_frames_is_that_of_the_processors_own_call(name: str):
    num_frames = 4 if name in ONE_LENGTH else None
    num_videos = 0
    for record in records_of(name, "lists", lambda r: random_frames(r, num_frames=num_frames)):
        image_S = compare(name, encoder_of(name), record, do_sample_frames=False)
        numbers = image_S[image_S >= 0]
        assert sorted(set(numbers.tolist())) == list(range(len(record.images)))
        assert torch.equal(numbers, numbers.sort().values)
        num_videos += sum(isinstance(each, Video) for each in record.images)
    assert num_videos > 3


@each_processor
@pytest.mark.parametrize("num_frames", [None, 4])
def test_a_sample_with_files_has_the_frames_that_the_processor_takes(
    name: str, num_frames: int | None, films: list[Path]
):
    if name in ONE_LENGTH and num_frames is None:
        films = films[:1]
    given: dict[str, Any] = {}
    if num_frames is not None:
        given = {"num_frames": num_frames, "fps": None, "do_sample_frames": True}
    encoder = encoder_of(name, video_frames=num_frames)
    for record in records_of(name, "files", lambda r: Video(r.choice(films)))[:4]:
        compare(name, encoder, record, **given)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_micro_batch_has_the_inputs_of_the_processors_own_call(name: str, films: list[Path]):
    vision = ProcessorVision(video_processor(name), MAKERS[name][2])
    records = records_of(name, "batch", lambda r: Video(r.choice(films)))[:4]
    shown = [visuals_of(record, encoder_of(name).encode(record).images) for record in records]
    own = own_call(name, records)
    inputs = vision.sample_pixels(shown) | vision.extra_inputs(own["input_ids"], Tensor())
    for key in inputs:
        assert torch.equal(inputs[key], torch.as_tensor(own[key])), key


def test_timestamps_stay_and_patches_are_the_videos():
    record = replace(
        random_record(Random(0), num_images=1),
        images=(random_frames(Random(1), num_frames=4),),
    )
    sample, tokens = encoder_of("qwen3_vl").encode(record), processor("qwen3_vl").tokenizer
    text, is_video_S = tokens.decode(sample.input_ids_S), sample.image_S == 0
    assert text.count(" seconds>") == 2
    assert set(tokens.convert_ids_to_tokens(sample.input_ids_S[is_video_S])) == {"<|video_pad|>"}
    assert "<|video_pad|>" not in tokens.convert_ids_to_tokens(sample.input_ids_S[~is_video_S])


def test_a_prompt_shows_the_videos_of_the_turns_before_it():
    random = Random(5)
    record = random_record(random, num_images=3)
    while len(record.turns) < 2 or "<image>" not in record.turns[0].question:
        record = random_record(random, num_images=3)
    record = with_videos(random, record, lambda: random_frames(random, num_frames=2))
    assert any(isinstance(each, Video) for each in record.images)
    encoder = encoder_of("qwen2_vl")
    sample, kinds = encoder.encode(record), encoder.settings()["ids"][:2]
    for turn in range(len(record.turns)):
        ids_S, image_S = encoder.prompt(record, sample, turn)
        assert torch.equal(ids_S, sample.input_ids_S[: len(ids_S)])
        assert torch.equal(image_S, sample.image_S[: len(ids_S)])
        assert torch.equal(image_S >= 0, torch.isin(ids_S, torch.tensor(kinds)))


def test_a_teacher_s_tokenizer_reads_as_many_tokens_for_a_video():
    record = replace(
        random_record(Random(0), num_images=1), images=(random_frames(Random(1), num_frames=4),)
    )
    own, tokens = encoder_of("qwen2_vl"), MAKERS["llava"][0]().tokenizer
    other = own.uncut(tokens, placeholder_id=tokens.pad_token_id).encode(record)
    assert int((other.image_S == 0).sum()) == int((own.encode(record).image_S == 0).sum()) > 0


def refused(name: str, record: Record, cause: str) -> None:
    with pytest.raises(SampleError, match=cause) as one:
        encoder_of(name).encode(record)
    assert "\n" not in str(one.value)


def test_frames_of_several_sizes_are_refused():
    frames = tuple(random_image(Random(2), range(n, n + 1)) for n in (20, 30))
    record = replace(random_record(Random(0), num_images=1), images=(Video(frames),))
    refused("qwen2_vl", record, "is 20 x 20 pixels, .* 30 x 30; give all frames of a video one")


def test_videos_that_a_processor_cannot_join_are_refused():
    vision = ProcessorVision(video_processor("internvl"), MAKERS["internvl"][2])
    shown = []
    for count in (2, 3):
        video = random_frames(Random(count), num_frames=count)
        record = replace(random_record(Random(0), num_images=1), images=(video,))
        shown.append(visuals_of(record, encoder_of("internvl").encode(record).images))
    with pytest.raises(ValueError, match=r"joins no videos of \[2, 3\] frames in a micro-batch"):
        vision.sample_pixels(shown)


def test_a_processor_that_takes_no_videos_says_so():
    record = replace(
        random_record(Random(0), num_images=1), images=(random_frames(Random(1), num_frames=4),)
    )
    own = MAKERS["gemma3"][0]()
    cause = "has a video .videos are not given to a Gemma3Processor yet.; give its frames as images"
    with pytest.raises(SampleError, match=cause):
        chat_encoder(own, MAKERS["gemma3"][2], max_length=999).encode(record)
    own = MAKERS["qwen2_vl"][0]()
    own.video_processor = {"max_frames": 7}
    cause = "the Qwen2VLProcessor takes videos only where torchvision is installed.; give its"
    with pytest.raises(SampleError, match=cause):
        chat_encoder(own, MAKERS["qwen2_vl"][2], max_length=999).encode(record)


def test_every_processor_that_takes_videos_is_tried():
    assert {PROCESSORS[name] for name in ALL_NAMES} == set(PATCHES)


def test_videos_of_a_file_are_kept_whole(tmp_path: Path, films: list[Path]):
    for n in range(3):
        folder = tmp_path / "clip"
        folder.mkdir(exist_ok=True)
        (folder / f"{n}.png").write_bytes(random_image(Random(n), range(20, 21)).content)
    turns = [{"from": "human", "value": "<video><video>"}, {"from": "gpt", "value": "yes"}]
    parser = Parser(tmp_path / "data.json", "set", tmp_path, True, "whole")
    record = parser.record(0, {"videos": ["clip", str(films[0])], "conversations": turns})
    assert record.images_per_marker == (1, 1)
    frames, file = record.images
    assert isinstance(frames, Video)
    assert file == Video(films[0])
    assert frames.source == tuple(folder / f"{n}.png" for n in range(3))
    sample = encoder_of("qwen2_vl", video_frames=2).encode(record)
    clips: Any = visuals_of(record, sample.images)
    assert [clip.taken for clip in clips] == [(0, 1, 2), (0, 4)]
    wanted = frames_of(file)[[0, 4]]
    assert np.array_equal(np.stack([np.asarray(frame) for frame in clips[1].frames]), wanted)
