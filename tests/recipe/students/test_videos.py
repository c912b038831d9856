"""What models get of videos from the loader, and a run on them.

Where torchvision is not installed a stand-in takes the place of transformers' part for videos.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import is_torchvision_available

from regate_ds.data.chat.vision import ProcessorVision
from regate_ds.data.collate import Batch, Collator, SampleDataset
from regate_ds.data.llava.media import Video
from regate_ds.data.llava.records import Record
from regate_ds.recipe.rank_job import _Files
from regate_ds.recipe.students.processor import chat_encoder
from tests.families.rows import attached
from tests.families.zoo.cases import Case
from tests.families.zoo.compare import attached_run, gradient_error, loss_error, oracle_run
from tests.families.zoo.fp64 import in_fp64
from tests.recipe.rank_helper import in_a_process
from tests.support.chat_corpus import make_chat_corpus
from tests.support.chat_students import make_model
from tests.support.conversations import random_record, said, with_videos
from tests.support.processors import MAKERS
from tests.support.videos import NAMES, random_frames, video_processor


def records_of(name: str) -> list[Record]:
    random = Random(f"model {name}")
    records = [random_record(random, n, num_images=n) for n in (3, 2)]
    return [
        with_videos(random, record, lambda: random_frames(random, num_frames=4))
        for record in records
    ]


def batch_of(name: str, records: list[Record]) -> Batch:
    own, patch = video_processor(name), MAKERS[name][2]
    loaded = SampleDataset(records, chat_encoder(own, patch, max_length=10_000))
    collate = Collator(pad_id=own.tokenizer.pad_token_id, vision=ProcessorVision(own, patch))
    return collate([loaded[row] for row in range(len(records))])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_gets_from_the_collator_what_its_processor_gives_it(name: str):
    model, records = make_model(name).eval(), records_of(name)
    batch = batch_of(name, records)
    videos = [each for one in records for each in one.images if isinstance(each, Video)]
    assert 0 < len(videos) < 5
    about = [{"total_num_frames": 4, "frames_indices": list(range(4))} for _ in videos]
    call = video_processor(name).apply_chat_template(
        [said(record) for record in records],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={
            "padding": True,
            "padding_side": "right",
            "video_metadata": about,
            "do_sample_frames": False,
        },
    )
    assert torch.equal(batch.inputs["input_ids"], call["input_ids"])
    with torch.no_grad():
        ours, theirs = model(**batch.inputs).logits, model(**call).logits
    is_real_BT = batch.tokens.segment_BT >= 0
    torch.testing.assert_close(ours[is_real_BT], theirs[is_real_BT], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen2_vl"])
def test_patches_of_videos_are_elided_as_the_oracle_does_it(name: str):
    with in_fp64():
        model, batch = make_model(name), batch_of(name, records_of(name))
        inputs = {
            key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for key, x in batch.inputs.items()
        }
        plans = dict(Case(name, inputs, batch.tokens).plans())
        plan, gated = plans["answers and images"], range(1, 3)
        with attached(model, gated):
            found = attached_run(model, inputs, plan)
        wanted = oracle_run(model, inputs, plan, gated)
    assert loss_error(found, wanted) < 1e-10
    assert gradient_error(found, wanted)[0] < 1e-8


@pytest.mark.skipif(
    not is_torchvision_available(), reason="transformers' video processors need torchvision"
)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_and_answers_on_videos(name: str, tmp_path: Path):
    path = make_chat_corpus(tmp_path, name, with_films=True)
    for command in ("teacher", "train", "eval"):
        what = str(path) if command != "eval" else str(tmp_path / "run")
        assert in_a_process([command, what, "--debug"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert 0.4 <= rows[1]["image_kept"] / rows[1]["image_total"] < 0.6


def test_a_ranking_of_a_corpus_with_videos_is_refused():
    corpus: Any = SimpleNamespace(train_records=records_of("qwen2_vl"))
    with pytest.raises(ValueError, match=r"mine.json, record \d, has a video"):
        _Files(corpus)
